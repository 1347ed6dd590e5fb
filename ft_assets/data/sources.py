"""Reading every source of a task into raw rows."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pandas as pd

from ft_assets.data.layouts import Layout, layout_of
from ft_assets.data.mail import read_mail
from ft_assets.data.packages import fetch_package
from ft_assets.data.rows import ROW_COLUMNS, frame
from ft_assets.data.tables import format_of, read_table
from ft_assets.tasks import FilesSource, PackageSource, SourceSpec, TaskSpec
from ft_resources.errors import SourceError
from ft_resources.folders import read_errors


def read_sources(
    spec: TaskSpec,
    folder: Path,
    cache: Path,
    feedback: Callable[[], pd.DataFrame],
    report: Callable[[str], None] = lambda line: None,
) -> pd.DataFrame:
    """Raw rows of all sources in order, duplicates included.

    Args:
        folder: Where relative URLs start.
        cache: Where fetched packages are kept.
        feedback: Raw rows from the ledger.
        report: Called with a line for each source.

    Raises:
        SourceError: A source cannot be read; names file and line.
    """
    parts = []
    for source in spec.sources:
        if isinstance(source, FilesSource):
            rows = _within(_files(source, layout_of(spec, source), folder), source, report, source.url)
        elif isinstance(source, PackageSource):
            rows = _package(source, layout_of(spec, source), cache)
            rows = _within(rows, source, report, f"{source.registry} package {source.name}")
        else:
            rows = feedback()
            report(f"feedback: {len(rows)} rows whose label came back")
        parts.append(rows)
    filled = [part for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else frame([], [], [], [], "files")[ROW_COLUMNS]


def _within(rows: pd.DataFrame, source: SourceSpec, report: Callable[[str], None], name: str) -> pd.DataFrame:
    kept = pd.Series(True, index=rows.index)
    if source.since:
        kept &= rows["event_time"] >= datetime.combine(source.since, datetime.min.time(), UTC)
    if source.until:
        kept &= rows["event_time"] < datetime.combine(source.until, datetime.min.time(), UTC)
    undated = int(rows["event_time"].isna().sum()) if source.since or source.until else 0
    outside = (
        f", {int((~kept).sum())} outside since/until ({undated} of them undated)"
        if source.since or source.until
        else ""
    )
    report(f"{name}: {int(kept.sum())} rows{outside}")
    return rows[kept].reset_index(drop=True)


def _files(source: FilesSource, layout: Layout, folder: Path) -> pd.DataFrame:
    url = source.url
    if "://" not in url and not Path(url).is_absolute():
        url = str(folder.resolve() / url)
    try:
        files = fsspec.open_files(url, "rb")
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(
            f"the URL cannot be opened: {error}", where=url, mend="Check the URL and its protocol."
        ) from error
    if not files:
        raise SourceError("no file matches", where=url, mend="Check the path; it starts at the task file's folder.")
    parts = []
    for file in sorted(files, key=lambda one: str(one.path)):
        try:
            with file as stream:
                content = stream.read()
        except FileNotFoundError:
            raise SourceError(
                "there is no such file", where=file.path, mend="Check the path; it starts at the task file's folder."
            ) from None
        except read_errors() as error:
            raise SourceError(
                f"the file cannot be read: {error}", where=file.path, mend="Check that it can be reached and opened."
            ) from error
        kind = format_of(file.path, source.format)
        parts.append(read_table(content, file.path, kind, layout, source.event_time, source.encoding, "files"))
    return pd.concat(parts, ignore_index=True)


def _package(source: PackageSource, layout: Layout, cache: Path) -> pd.DataFrame:
    root = fetch_package(source.registry, source.name, source.version, source.integrity, cache)
    prefix = f"{source.registry}:{source.name}@{source.version}"
    target = root / source.path
    if not target.resolve().is_relative_to(root.resolve()) or not target.exists():
        raise SourceError(
            f"the package has no '{source.path}'",
            where=prefix,
            mend=f"It has: {sorted(p.name for p in root.iterdir())}.",
        )
    if source.format == "mail":
        return _mails(source, target, root, prefix)
    if target.is_dir():
        raise SourceError(
            f"'{source.path}' is a folder of the package", where=prefix, mend="Name a file in it, or set format: mail."
        )
    kind = format_of(target.name, source.format)
    name = f"{prefix}/{target.relative_to(root).as_posix()}"
    return read_table(target.read_bytes(), name, kind, layout, source.event_time, source.encoding, "package")


def _mails(source: PackageSource, target: Path, root: Path, prefix: str) -> pd.DataFrame:
    texts, labels, sources, times = [], [], [], []
    for name, label in source.folders.items():
        mails = sorted((target / name).glob("*.txt"))
        if not mails:
            there = sorted(path.name for path in target.iterdir() if path.is_dir()) if target.is_dir() else []
            raise SourceError(
                f"there are no mails in '{name}'", where=f"{prefix}/{source.path}", mend=f"Folders there: {there}."
            )
        for path in mails:
            text, moment = read_mail(path.read_bytes())
            texts.append(text.encode("utf-8", "replace").decode())
            labels.append(label)
            sources.append(f"{prefix}/{path.relative_to(root).as_posix()}")
            times.append(moment.isoformat() if moment else None)
    if not texts:
        raise SourceError("format mail needs `folders`", where=prefix, mend="Map folder names to labels.")
    return frame(texts, labels, sources, times, "package")
