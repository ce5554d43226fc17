"""Personal data in a text: which kinds it seems to hold, never what it holds."""

from __future__ import annotations

import re

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63})*\.[a-z]{2,24}\b", re.IGNORECASE)
_PHONE = re.compile(
    r"(?<![\w.+])(?:\+\d[\d ().-]{6,20}\d|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([.-])\d{3}\1\d{4})(?![\d.-]*\d)"
)
_PHONE_DIGITS = range(8, 16)
_CARD = re.compile(r"(?<![\d.,-])[2-6]\d{3}(?:[ -]?\d){8,15}(?![\d.,-]*\d)")
_CARD_DIGITS = range(13, 20)
_SOCIAL = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_IBAN = re.compile(r"(?<![A-Z0-9])([A-Z]{2})\d{2}(?: ?[A-Z0-9]){11,30}")
_COUNTRIES = (
    "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 FO18 FR27"
    " GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 MC27"
    " MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28"
    " TL23 TN24 TR26 UA29 VA22 VG24 XK20"
)
_IBAN_LENGTHS = {entry[:2]: int(entry[2:]) for entry in _COUNTRIES.split()}


def personal(text: str) -> tuple[str, ...]:
    """The kinds of personal data that the text seems to hold.

    Card numbers are told by their check digit (ISO/IEC 7812), IBANs by theirs (ISO 13616) and their country's length.
    """
    found = {
        "an e-mail address": "@" in text and _EMAIL.search(text) is not None,
        "a phone number": any(_digits(one[0]) in _PHONE_DIGITS for one in _PHONE.finditer(text)),
        "a card number": any(_is_card(one[0]) for one in _CARD.finditer(text)),
        "an IBAN": any(_is_iban(one[0]) for one in _IBAN.finditer(text)),
        "a social security number": _SOCIAL.search(text) is not None,
    }
    return tuple(kind for kind, there in found.items() if there)


def _digits(text: str) -> int:
    return sum(character.isdigit() for character in text)


def _is_card(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(digits) in _CARD_DIGITS and len(set(digits)) > 1 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _is_iban(text: str) -> bool:
    """Whether the text begins with an IBAN: what follows it may look like more of it."""
    packed = text.replace(" ", "")
    length = _IBAN_LENGTHS.get(packed[:2], 0)
    if not length or len(packed) < length:
        return False
    turned = packed[4:length] + packed[:4]
    return int("".join(str(int(character, 36)) for character in turned)) % 97 == 1
