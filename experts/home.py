"""One home: the models, artifacts and registry of an installation, seeded with what the project ships."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from filelock import FileLock

from ..errors import ArtifactCorrupt, SettingsError
from ..models.cache import ModelCache
from ..schema import Base, Card, Evidence, Release
from ..settings import Settings
from .artifacts import ArtifactStore
from .bundle import import_release
from .registry import Registry

SHIPPED = Path(__file__).parent.parent / "shipped"


class Home:
    """Opens what lives in `settings.home`; the first to open it seeds it."""

    def __init__(self, settings: Settings) -> None:
        root = settings.home.expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"{root} cannot be the home: {error.strerror}.", hint="Set COLLEGIUM_HOME.") from None
        self.root = root
        self.settings = settings
        self.models = ModelCache(root / "models", timeout=settings.fetch_timeout)
        self.artifacts = ArtifactStore(root / "artifacts")
        self.registry = Registry.open(settings.database_url or f"sqlite:///{root / 'collegium.sqlite'}")
        if self.registry.live() is None and SHIPPED.is_dir():
            with FileLock(root / "seed.lock"):  # of two processes on a new home, one seeds it
                if self.registry.live() is None:
                    import_release(SHIPPED, self.registry, self.artifacts, note="shipped")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the registry."""
        self.registry.close()

    def release(self) -> Release:
        """The live release. Raises ArtifactCorrupt where there is none, which a seeded home always has."""
        live = self.registry.live()
        if live is None:
            raise ArtifactCorrupt("This home has no release.", hint="Install the package again, or fit a router.")
        return live

    def cards(self, release: Release) -> dict[str, Card]:
        """The card of each name in `release`."""
        return {name: self.registry.card(version) for name, version in release.aliases.items()}

    def ensure_base(self, identity: str) -> Release:
        """The live release, with `base` standing for the base model of this identity."""
        release = self.release()
        known = release.aliases.get("base")
        if known is not None and self.registry.card(known).base == identity:
            return release
        card = base_card(identity)
        return self.registry.publish(cards=[card], aliases={"base": card.version}, note=f"base model {identity}")


def base_card(identity: str) -> Card:
    """The card of the base model itself."""
    return Card("base", "", Base(), identity, evidence=Evidence(description="The base model, without an adapter."))
