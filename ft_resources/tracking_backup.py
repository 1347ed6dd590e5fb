"""Backups of an MLflow tracker: made, pruned, verified, restored.

A backup is a folder named after its time (UTC) with a dump of the database, the artefacts, and, written last, a
`manifest.json` that lists the SHA-256 of every file and the rows of every table. Without a manifest it does not
exist; with a byte changed anywhere it is refused.
"""

import json
import re
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ft_resources.errors import BackupError
from ft_resources.folders import Folder
from ft_resources.lake import MANIFEST, canonical, digest_of
from ft_resources.tracking_store import TrackingStore, open_folder, usable

FORMAT = 1
STAMP = "%Y%m%dT%H%M%S%fZ"
STAMPED = re.compile(r"\d{8}T\d{12}Z")
DATABASE = "database.dump"
ARTIFACTS = "artifacts"


@dataclass(frozen=True)
class Backup:
    """A complete backup; its files are as yet unread.

    Args:
        folder: Where it is.
        manifest: What `manifest.json` says, compared with the digest in it.
    """

    folder: Folder
    manifest: dict[str, Any]

    @property
    def created_at(self) -> datetime:
        return datetime.fromisoformat(self.manifest["created_at"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """`sha256` and `size` in bytes by path."""
        return dict(self.manifest["files"])

    @property
    def rows(self) -> int:
        return sum(table["rows"] for table in self.manifest["tables"].values())

    @property
    def bytes(self) -> int:
        return sum(entry["size"] for entry in self.files.values())

    @property
    def artifacts(self) -> list[str]:
        """Paths of the artefacts, relative to the folder of artefacts."""
        return [name.removeprefix(f"{ARTIFACTS}/") for name in self.files if name != DATABASE]

    @property
    def database_only(self) -> bool:
        """Whether artefacts were left where they are."""
        return bool(self.manifest["database_only"])

    @property
    def runs_elsewhere(self) -> int:
        """Runs whose artefacts were outside the folder of artefacts: they are not in any backup."""
        return int(self.manifest["runs_elsewhere"])

    def verify(self) -> None:
        """Read every file.

        Raises:
            BackupError: One is missing or is not what the manifest promises.
        """
        for name, entry in self.files.items():
            with usable(self.folder):
                try:
                    intact = self.folder.digest(name) == entry["sha256"]
                except FileNotFoundError:
                    intact = False
            if not intact:
                raise _damaged(self.folder, name)


def backup(store: TrackingStore, target: str, *, database_only: bool = False, keep: int | None = None) -> Backup:
    """Back a tracker up while it is in use. The database is copied first, so that no run of it lacks an artefact.

    Args:
        target: Folder or fsspec URL of backups; this one becomes a folder in it.
        database_only: Leave the artefacts where they are, such as in a bucket that keeps versions.
        keep: Remove complete backups beyond the newest so many, and broken-off ones among them; default: none.

    Raises:
        BackupError: The database cannot be dumped, or a place not be read or written. What was written up to
            then has no manifest, so it is no backup.
    """
    backups = open_folder(target)
    if store.artifacts.holds(backups):
        raise BackupError(
            "backups cannot lie among the artefacts they are of", where=target, mend="Name a folder beside them."
        )
    now = datetime.now(UTC)
    folder = backups.below(now.strftime(STAMP))
    with tempfile.TemporaryDirectory(prefix="ft-backup-") as scratch, usable(backups):
        tables = store.dump(Path(scratch) / DATABASE)
        files = {DATABASE: folder.take(DATABASE, Folder(scratch), DATABASE)}
        with usable(store.artifacts):
            names = [] if database_only else store.artifacts.names()
        for name in names:
            files[f"{ARTIFACTS}/{name}"] = folder.take(f"{ARTIFACTS}/{name}", store.artifacts, name)
        said = {
            "format": FORMAT,
            "created_at": now.isoformat(),
            "kind": store.kind,
            "artifacts": store.artifacts.uri,
            "database_only": database_only,
            "runs_elsewhere": store.runs_elsewhere(),
            "tables": tables,
            "files": files,
        }
        manifest = {**said, "digest": digest_of(said)}
        folder.write(MANIFEST, canonical(manifest))
        if keep is not None:
            _prune(backups, keep)
    return Backup(folder, manifest)


def find(url: str) -> Backup:
    """The backup at `url`, or the newest complete one in it.

    Raises:
        BackupError: There is none, or its manifest is damaged.
    """
    folder = open_folder(url)
    with usable(folder):
        for each in (folder, *(folder.below(name) for name in reversed(_stamped(folder)))):
            try:
                content = each.read(MANIFEST)
            except (FileNotFoundError, NotADirectoryError):
                continue
            return Backup(each, _manifest(each, content))
    raise BackupError("there is no backup", where=url, mend="Make one: ft tracking backup")


def restore(found: Backup, store: TrackingStore) -> None:
    """Fill an empty tracker from a backup and compare every row and artefact with what was backed up.

    Locations in the database follow the artefacts where these are restored to another folder. Artefacts that were
    not backed up are expected in the store's folder.

    Raises:
        BackupError: The backup is damaged or of another kind of database, the store is not empty, or what came
            back is not what was backed up. Up to the first copied artefact nothing was changed.
    """
    if found.manifest["kind"] != store.kind:
        raise BackupError(
            f"this is a backup of {found.manifest['kind']}, which cannot be restored into {store.kind}",
            where=found.folder.url,
            mend=f"Give the URL of an empty database of {found.manifest['kind']}.",
        )
    store.require_empty(artifacts=not found.database_only)
    found.verify()
    with tempfile.TemporaryDirectory(prefix="ft-restore-") as scratch:
        for name, entry in found.files.items():
            inside, original = (Folder(scratch), name) if name == DATABASE else (store.artifacts, _artifact(name))
            with usable(store.artifacts):
                if inside.take(original, found.folder, name) != entry:
                    raise _damaged(found.folder, name)
        # the database comes last: a tracker that has one has its artefacts too
        store.load(Path(scratch) / DATABASE, found.manifest["tables"])
    for name in found.artifacts:
        with usable(store.artifacts):
            if store.artifacts.digest(name) != found.files[f"{ARTIFACTS}/{name}"]["sha256"]:
                raise _damaged(store.artifacts, name)
    if found.manifest["artifacts"] != store.artifacts.uri:
        store.relocate(found.manifest["artifacts"])


def _artifact(name: str) -> str:
    return name.removeprefix(f"{ARTIFACTS}/")


def _stamped(folder: Folder) -> list[str]:
    return [name for name in folder.folders() if STAMPED.fullmatch(name)]


def _prune(backups: Folder, keep: int) -> None:
    names = _stamped(backups)
    complete = [name for name in names if backups.below(name).has(MANIFEST)]
    for name in names:
        if len(complete) > keep and name < complete[-keep]:
            backups.below(name).remove()


def _manifest(folder: Folder, content: bytes) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(content)
        digest = manifest.pop("digest")
        intact = digest == digest_of(manifest)
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise _damaged(folder, MANIFEST)
    if manifest["format"] != FORMAT:
        raise BackupError(
            f"this backup has format {manifest['format']}",
            where=folder.url,
            mend=f"Restore it with the version that made it; this one reads format {FORMAT}.",
        )
    return manifest


def _damaged(folder: Folder, name: str) -> BackupError:
    return BackupError(
        f"the backup is damaged: '{name}' is not what was backed up",
        where=folder.url,
        mend="Take another backup, or an earlier version of this file where the store keeps them.",
    )
