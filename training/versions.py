"""One name's versions: back to an earlier one, or out of service and kept."""

from __future__ import annotations

from ..errors import InvalidRequest, NameTaken, UnknownExpert
from ..experts.home import Home
from ..router.artifact import RouterArtifact
from ..schema import Card, Release
from .register import one_at_a_time


def retire(home: Home, name: str) -> Release:
    """Publish a release without the alias `name`; its versions, its domain's index and the router class stay.

    The fallback answers for the domain, with the reason `no_expert`, until `rollback` brings the expert back. Raises
    UnknownExpert that lists the live ones, or InvalidRequest for the fallback and the base model.
    """
    with one_at_a_time(home):
        release = home.release()
        if name not in release.aliases:
            raise UnknownExpert(f"There is no expert {name!r}.", hint=f"Known: {', '.join(sorted(release.aliases))}.")
        if name in {home.settings.fallback, "base"}:
            raise InvalidRequest(f"{name} answers where no other expert does; it stays.")
        return home.registry.publish(aliases={name: None}, note=f"retire {release.aliases[name]}")


def rollback(home: Home, name: str, version: str = "") -> tuple[Card, Release]:
    """Publish a release in which `name` means an earlier version; router, indexes and all other names stay.

    Without a `version` (such as `law@3f2a91`) it is the one that was live before the present one, or the last one of a name
    that is not live. Raises UnknownExpert for a name or version that was never registered, InvalidRequest where there is
    nothing to go back to or the version cannot serve here, NameTaken where another expert answers for its domain by now, and
    ArtifactCorrupt where its files are damaged; nothing is published then.
    """
    with one_at_a_time(home):
        release = home.release()
        card = _find(home, release, name, version)
        _check(home, release, card)
        return card, home.registry.publish(aliases={name: card.version}, note=f"roll back to {card.version}")


def _find(home: Home, release: Release, name: str, version: str) -> Card:
    known = [card for card in home.registry.cards() if card.name == name]
    if not known:
        names = sorted({card.name for card in home.registry.cards()})
        raise UnknownExpert(f"There is no expert {name!r}.", hint=f"Known: {', '.join(names)}.")
    hint = f"Versions of {name}, the oldest first: {', '.join(card.version for card in known)}."
    if not version:
        earlier = _earlier(home, release, name)
        if earlier is None:
            raise InvalidRequest(f"No other version of {name} was live before.", hint=hint)
        return home.registry.card(earlier)
    try:
        card = home.registry.resolve(version, release)
    except UnknownExpert as error:
        raise UnknownExpert(error.message, hint=hint) from None
    if card.name != name:
        raise InvalidRequest(f"{card.version} is no version of {name}.", hint=hint)
    if card.version == release.aliases.get(name):
        raise InvalidRequest(f"{card.version} is live already.", hint=hint)
    return card


def _earlier(home: Home, release: Release, name: str) -> str | None:
    """What the name meant last before it meant what it does now, on the way that led to the live release."""
    releases = {one.id: one for one in home.registry.releases()}
    now, at = release.aliases.get(name), release.parent
    while at is not None and at in releases:
        version = releases[at].aliases.get(name)
        if version not in (None, now):
            return version
        at = releases[at].parent
    return None


def _check(home: Home, release: Release, card: Card) -> None:
    """Whether the version would serve if it were live."""
    if card.name == "base":
        raise InvalidRequest("base is the model that the setting base_model names.", hint="Set base_model instead.")
    base = release.aliases.get("base")
    if base is not None and (here := home.registry.card(base).base) != card.base:
        raise InvalidRequest(
            f"{card.version} is of the base model {card.base}, this home's is {here}.",
            hint="Set base_model back, or train it again.",
        )
    for alias, other in home.cards(release).items():
        if card.domain and other.domain == card.domain and alias != card.name:
            raise NameTaken(f"{alias} answers for {card.domain} by now.", hint=f"Retire {alias} first.")
    if card.domain and card.name not in release.aliases:
        _check_domain(home, release, card)
    for version in card.spec.artifacts:
        home.artifacts.verify(version)


def _check_domain(home: Home, release: Release, card: Card) -> None:
    """A domain that was removed has left the router: its expert alone would never be asked."""
    if card.domain in RouterArtifact.load(home.artifacts.verify(release.router)).head.domains:
        return
    last = next((one.id for one in home.registry.releases() if one.aliases.get(card.name) == card.version), None)
    brought = f"`collegium releases rollback {last}` brings back all of then" if last else "Add it again"
    raise InvalidRequest(
        f"The router does not know the domain {card.domain} any more.",
        hint=f"{brought}; `collegium experts add {card.domain}` teaches it anew.",
    )
