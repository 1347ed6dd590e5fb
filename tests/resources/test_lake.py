import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pandas as pd
import pytest

from ft_resources.errors import ArtefactError
from ft_resources.lake import MANIFEST, Artefact, Lake, canonical, digest_of

FROM = {"task": "mail-triage", "sources": ["a.jsonl"], "share": 0.1}


@pytest.fixture(params=["folder", "memory"])
def lake(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Lake]:
    """An empty lake on a local disk, and one on an object store."""
    if request.param == "folder":
        yield Lake(tmp_path / "lake")
        return
    url = f"memory://lake-{uuid.uuid4().hex}"
    yield Lake(url, cache=tmp_path / "cache")
    store, root = fsspec.core.url_to_fs(url)
    if store.exists(root):
        store.rm(root, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> Lake:
    return Lake(tmp_path / "lake")


@pytest.fixture
def content(tmp_path: Path) -> Path:
    """What an asset wrote: a table, a JSON document and a file in a folder of its own."""
    folder = tmp_path / "content"
    (folder / "inner").mkdir(parents=True)
    pd.DataFrame({"row_id": ["a", "b"]}).to_parquet(folder / "rows.parquet")
    (folder / "about.json").write_text('{"rows": 2}', encoding="utf-8")
    (folder / "inner" / "weights.bin").write_bytes(bytes(range(256)) * 100)
    return folder


def everything(lake: Lake) -> dict[str, bytes]:
    """Every stored file below the lake's root."""
    store, root = fsspec.core.url_to_fs(lake.url)
    return {name: store.cat_file(name) for name in store.find(root)}


def objects(lake: Lake) -> list[str]:
    return sorted(name for name in everything(lake) if "/objects/" in name)


def test_what_was_published_is_read_back(lake: Lake, content: Path) -> None:
    published = lake.publish("raw_dataset", content, FROM)
    opened = Lake(lake.url, cache=content / "another-cache").open(published.digest)
    assert opened.kind == "raw_dataset"
    assert opened.made_from == FROM
    assert opened.json("about.json") == {"rows": 2}
    assert opened.parquet("rows.parquet")["row_id"].tolist() == ["a", "b"]
    assert opened.path("inner/weights.bin").read_bytes() == (content / "inner" / "weights.bin").read_bytes()
    assert sorted(opened.files) == ["about.json", "inner/weights.bin", "rows.parquet"]
    assert opened.uri == f"{lake.url}/objects/{published.digest[:2]}/{published.digest}"
    with pytest.raises(ArtefactError, match=r"has no file 'row\.parquet'"):
        opened.parquet("row.parquet")


def test_equal_content_from_equal_things_is_one_object(lake: Lake, content: Path) -> None:
    first = lake.publish("raw_dataset", content, FROM)
    before = everything(lake)
    assert lake.publish("raw_dataset", content, dict(reversed(FROM.items()))).digest == first.digest
    assert everything(lake) == before
    others = [
        lake.publish("clean_dataset", content, FROM).digest,
        lake.publish("raw_dataset", content, {**FROM, "share": 0.2}).digest,
    ]
    (content / "about.json").write_text('{"rows": 3}', encoding="utf-8")
    others.append(lake.publish("raw_dataset", content, FROM).digest)
    assert len({first.digest, *others}) == 4


def test_the_digest_is_that_of_the_manifest(local: Lake, content: Path) -> None:
    published = local.publish("raw_dataset", content, FROM)
    manifest = json.loads((published.folder / MANIFEST).read_bytes())
    assert digest_of(manifest) == published.digest
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()


def test_found_by_what_it_was_made_from(lake: Lake, content: Path) -> None:
    assert lake.find("raw_dataset", FROM) is None
    published = lake.publish("raw_dataset", content, FROM)
    assert lake.find("raw_dataset", FROM) == published
    assert lake.find("clean_dataset", FROM) is None
    assert lake.find("raw_dataset", {**FROM, "task": "other"}) is None
    tuples = lake.publish("split", content, {"shares": (0.1, 0.2)})
    assert lake.find("split", {"shares": (0.1, 0.2)}) == tuples


def test_heads_point_at_the_newest(lake: Lake, content: Path) -> None:
    assert lake.head("mail-triage", "adapter") is None
    assert lake.head_time("mail-triage", "adapter") is None
    with pytest.raises(ArtefactError, match="'adapter' of task 'mail-triage' was never materialised"):
        lake.require("mail-triage", "adapter")
    first = lake.publish("adapter", content, {"n": 1})
    second = lake.publish("adapter", content, {"n": 2})
    lake.set_head("mail-triage", "adapter", first.digest, "run-1")
    assert lake.head("mail-triage", "adapter") == first
    lake.set_head("mail-triage", "adapter", second.digest, "run-2")
    assert lake.require("mail-triage", "adapter") == second
    assert lake.head("other", "adapter") is None
    moment = lake.head_time("mail-triage", "adapter")
    assert moment is not None
    assert abs(moment - datetime.now(UTC)) < timedelta(minutes=5)


def test_heads_of_days_are_listed_in_order(lake: Lake, content: Path) -> None:
    assert lake.heads("mail-triage", "drift_report") == []
    digest = lake.publish("drift_report", content, FROM).digest
    for day in ("2002-08-02", "2002-08-01"):
        lake.set_head("mail-triage", f"drift_report/{day}", digest, "run")
    assert lake.heads("mail-triage", "drift_report") == ["2002-08-01", "2002-08-02"]


def flip(path: Path) -> None:
    """Change one bit and nothing else: not the size, and not the time of the last change."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("flipped", lambda folder: flip(folder / "rows.parquet"), "rows.parquet"),
    ("cut", lambda folder: os.truncate(folder / "inner" / "weights.bin", 10), "inner/weights.bin"),
    ("missing", lambda folder: (folder / "about.json").unlink(), "about.json"),
    ("folder", lambda folder: into_folder(folder / "about.json"), "about.json"),
    ("manifest", lambda folder: flip(folder / MANIFEST), MANIFEST),
    ("no-json", lambda folder: (folder / MANIFEST).write_bytes(b"\xff{"), MANIFEST),
    ("no-manifest", lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
]


@pytest.mark.parametrize(("damage", "name"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_damage_is_found_after_an_earlier_good_read_and_mended_by_publishing_again(
    local: Lake, content: Path, damage: Callable[[Path], None], name: str
) -> None:
    published = local.publish("raw_dataset", content, FROM)
    local.set_head("mail-triage", "raw_dataset", published.digest, "run")
    assert local.open(published.digest).json("about.json") == {"rows": 2}
    damage(published.folder)
    for opening in (lambda: local.open(published.digest), lambda: local.require("mail-triage", "raw_dataset")):
        with pytest.raises(ArtefactError, match=f"damaged: '{name}' is not what its digest promises") as caught:
            opening()
        assert caught.value.where == str(published.folder)
    assert local.find("raw_dataset", FROM) is None
    again = local.publish("raw_dataset", content, FROM)
    assert again == published
    assert local.find("raw_dataset", FROM) == again
    assert again.parquet("rows.parquet")["row_id"].tolist() == ["a", "b"]


def test_an_artefact_that_is_held_notices_damage(local: Lake, content: Path) -> None:
    held = local.publish("raw_dataset", content, FROM)
    flip(held.folder / "rows.parquet")
    with pytest.raises(ArtefactError, match=r"damaged: 'rows\.parquet'"):
        held.parquet("rows.parquet")
    (held.folder / "about.json").unlink()
    with pytest.raises(ArtefactError, match=r"damaged: 'about\.json'"):
        held.json("about.json")


def test_damage_on_the_far_side_and_in_the_copy_here(tmp_path: Path, content: Path) -> None:
    lake = Lake(f"memory://lake-{uuid.uuid4().hex}", cache=tmp_path / "cache")
    published = lake.publish("raw_dataset", content, FROM)
    flip(published.folder / "rows.parquet")
    assert lake.open(published.digest).parquet("rows.parquet")["row_id"].tolist() == ["a", "b"]
    store, root = fsspec.core.url_to_fs(published.uri)
    store.pipe_file(f"{root}/rows.parquet", b"garbage")
    fresh = Lake(lake.url, cache=tmp_path / "fresh")
    with pytest.raises(ArtefactError, match=r"damaged: 'rows\.parquet'"):
        fresh.open(published.digest)
    assert fresh.find("raw_dataset", FROM) is None
    store.rm(f"{root}/rows.parquet")
    with pytest.raises(ArtefactError, match=r"damaged: 'rows\.parquet'"):
        fresh.open(published.digest)
    store.pipe_file(f"{root}/{MANIFEST}", b'{"files": {"../../escaped": {}}}')
    with pytest.raises(ArtefactError, match=rf"damaged: '{MANIFEST}'"):
        fresh.open(published.digest)
    assert not list(tmp_path.rglob("escaped"))
    assert fresh.publish("raw_dataset", content, FROM).digest == published.digest
    assert not list((tmp_path / "fresh").glob("incoming-*"))


@pytest.mark.parametrize("pointer", [b"", b"\xff\xfe", b"../../../etc", b"0" * 64])
def test_a_broken_pointer_is_no_find(lake: Lake, content: Path, pointer: bytes) -> None:
    published = lake.publish("raw_dataset", content, FROM)
    store, _ = fsspec.core.url_to_fs(lake.url)
    (key,) = (name for name in everything(lake) if "/keys/" in name)
    store.pipe_file(key, pointer)
    assert lake.find("raw_dataset", FROM) is None
    assert lake.publish("raw_dataset", content, FROM) == published
    assert lake.find("raw_dataset", FROM) == published


def test_a_pointer_to_something_else_is_no_find(lake: Lake, content: Path) -> None:
    lake.publish("raw_dataset", content, FROM)
    (key,) = (name for name in everything(lake) if "/keys/" in name)
    other = lake.publish("raw_dataset", content, {**FROM, "share": 0.2})
    fsspec.core.url_to_fs(lake.url)[0].pipe_file(key, other.digest.encode())
    assert lake.find("raw_dataset", FROM) is None


@pytest.mark.parametrize("pointer", [b"", b"{", b"[]", b'{"digest": "x"}', b'{"digest": "x", "at": "never"}'])
def test_a_broken_head_is_a_typed_error(lake: Lake, content: Path, pointer: bytes) -> None:
    lake.set_head("mail-triage", "adapter", lake.publish("adapter", content, FROM).digest, "run")
    (head,) = (name for name in everything(lake) if "/heads/" in name)
    fsspec.core.url_to_fs(lake.url)[0].pipe_file(head, pointer)
    for asked in (lake.head, lake.require, lake.head_time):
        with pytest.raises(ArtefactError, match="pointer to 'adapter' of task 'mail-triage' is damaged"):
            asked("mail-triage", "adapter")


@pytest.mark.parametrize("digest", ["0" * 64, "", "../../etc", "a\0b", "A" * 64])
def test_no_such_artefact(lake: Lake, digest: str) -> None:
    with pytest.raises(ArtefactError, match=r"no artefact|no digest"):
        lake.open(digest)


def test_refuses_to_publish_nothing_or_a_manifest_of_its_own(lake: Lake, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ArtefactError, match="empty raw_dataset"):
        lake.publish("raw_dataset", empty, FROM)
    (empty / MANIFEST).write_bytes(b"{}")
    with pytest.raises(ArtefactError, match=f"a file '{MANIFEST}'"):
        lake.publish("raw_dataset", empty, FROM)
    assert objects(lake) == []


LIMITED = """
import json, resource, sys
from pathlib import Path
from ft_resources.errors import ArtefactError
from ft_resources.lake import Lake
lake, content, limit = Lake(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    lake.publish("raw_dataset", content, {"n": 1})
except ArtefactError as error:
    print(json.dumps([error.what, error.where, error.mend]))
"""


@pytest.mark.parametrize("limit", [0, 100, 20_000])
def test_nothing_half_written_is_visible_when_the_disk_is_full(local: Lake, content: Path, limit: int) -> None:
    # a limit on the size of files makes the same writes fail that a full disk does
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, local.url, str(content), str(limit)], capture_output=True, text=True, check=True
    )
    what, where, mend = json.loads(done.stdout)
    assert "raw_dataset" in what
    assert "could not be written" in what
    assert where == local.url
    assert "Free space" in mend
    assert not [path for path in Path(local.url).rglob("*") if path.is_file()]
    assert local.find("raw_dataset", {"n": 1}) is None
    published = local.publish("raw_dataset", content, {"n": 1})
    assert local.find("raw_dataset", {"n": 1}) == published


def test_a_lake_that_cannot_be_written_is_a_typed_error(tmp_path: Path, content: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    lake = Lake(tmp_path / "file" / "lake")
    with pytest.raises(ArtefactError, match="could not be written"):
        lake.publish("raw_dataset", content, FROM)
    with pytest.raises(ArtefactError, match="could not be written"):
        lake.set_head("mail-triage", "raw_dataset", "0" * 64, "run")


PUBLISHING = """
import sys
from pathlib import Path
from ft_resources.lake import Lake
lake, content = Lake(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for n in range(40):
    artefact = lake.publish("raw_dataset", content, {"n": n})
    assert lake.open(artefact.digest).json("about.json") == {"rows": 2}
    assert lake.find("raw_dataset", {"n": n}) == artefact
    print(artefact.digest)
"""


def test_two_processes_publish_the_same_at_once(local: Lake, content: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISHING, local.url, str(content)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    digests = [out.split() for out, _ in outputs]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 40
    assert sorted(path.name for path in Path(local.url).glob("objects/*/*")) == sorted(digests[0])
    assert not list(Path(local.url, "incoming").iterdir())


def test_an_object_survives_its_source(lake: Lake, content: Path) -> None:
    published: Artefact = lake.publish("raw_dataset", content, FROM)
    shutil.rmtree(content)
    assert lake.open(published.digest).json("about.json") == {"rows": 2}
