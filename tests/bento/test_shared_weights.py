"""Weights in memory once: what is read is what was loaded, whatever the file holds."""

from pathlib import Path

import pytest
import torch

from bento.shared_weights import share_weights


@pytest.fixture
def two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FT_WORKERS", "2")
    monkeypatch.setenv("FT_HOME", str(tmp_path))
    return tmp_path


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Two parts of one matrix, as the members of a group are, a bias in another dtype, and nothing."""
    torch.manual_seed(seed)
    both = torch.randn(6, 5)
    return {"both": both, "upper": both[:2], "lower": both[2:], "bias": torch.randn(3).bfloat16(), "no": torch.empty(0)}


def share(found: dict[str, torch.Tensor]) -> Path | None:
    return share_weights("base-encoder-fp32", found.values())


def test_what_another_process_wrote_is_mapped_if_it_is_the_same(two_workers: Path) -> None:
    first, second, expected = tensors(1), tensors(1), tensors(1)
    file = share(first)
    assert file is not None
    written = file.stat().st_ino
    assert share(second) == file
    assert file.stat().st_ino == written, "it was read, not written again"
    for name, tensor in expected.items():
        assert torch.equal(second[name], tensor), name
    assert second["lower"].untyped_storage().data_ptr() == second["both"].untyped_storage().data_ptr()
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert mapped.read_text().count(str(file)) == 2


@pytest.mark.parametrize("content", [b"", b"short", None], ids=["empty", "short", "others"])
def test_a_file_that_holds_something_else_is_written_again(two_workers: Path, content: bytes | None) -> None:
    file = share(tensors(1) if content is None else tensors(2))
    assert file is not None
    if content is not None:
        file.write_bytes(content)
    found = tensors(2)
    share(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(2).items())
    again = tensors(2)
    before = file.stat().st_ino
    share(again)
    assert file.stat().st_ino == before


def test_a_home_that_cannot_be_written_costs_memory_only(two_workers: Path, caplog: pytest.LogCaptureFixture) -> None:
    (two_workers / "bases").write_text("no folder")
    found = tensors(3)
    assert share(found) is None
    assert "own copy" in caplog.text
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(3).items())


def test_one_worker_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_HOME", str(tmp_path))
    monkeypatch.delenv("FT_WORKERS", raising=False)
    assert share(tensors(1)) is None
    assert not list(tmp_path.iterdir())
