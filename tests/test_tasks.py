from collections.abc import Callable
from pathlib import Path

import pytest

from ft_assets.tasks import Task, TaskFolders
from ft_resources.environments import REPOSITORY
from ft_resources.errors import SpecError

LINES = """\
name: triage
type: text-classification
labels: [ham, spam]
recipe: encoder-lora@1
sources:
  - kind: files
    url: "*.jsonl"
  - kind: package
    registry: npm
    name: mails
    version: 1.0.0
    integrity: sha256-AAAA
    format: mail
    folders:
      good: ham
      bad: spam
cleaning:
  min_chars: 5
gates:
  thresholds:
    accuracy: 0.9
""".splitlines()

Refused = Callable[..., SpecError]


def changed(*changes: tuple[int, str]) -> str:
    """The task with some lines (counted from 1) replaced."""
    lines = list(LINES)
    for number, text in changes:
        lines[number - 1] = text
    return "\n".join(lines) + "\n"


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Writes a task file, which must be refused, and gives the error."""

    def refuse(content: str | bytes) -> SpecError:
        path = tmp_path / "triage.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(SpecError) as caught:
            Task(path)
        assert str(path) in caught.value.where
        return caught.value

    return refuse


def test_the_task_that_the_others_are_made_from_is_valid(tmp_path: Path) -> None:
    (tmp_path / "triage.yaml").write_text(changed(), encoding="utf-8")
    task = Task(tmp_path / "triage.yaml")
    assert task.name == "triage"
    assert [source.kind for source in task.spec.sources] == ["files", "package"]
    assert task.spec.gates.thresholds == {"accuracy": 0.9}
    assert task.spec.cleaning.min_chars == 5


def test_a_tenant_stands_before_the_name(tmp_path: Path) -> None:
    (tmp_path / "triage.yaml").write_text(changed((1, "name: triage\ntenant: acme")), encoding="utf-8")
    assert Task(tmp_path / "triage.yaml").name == "acme.triage"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "deployments" / "tasks").glob("*.yaml")), ids=lambda p: p.stem)
def test_tasks_that_come_with_the_platform_are_valid(path: Path) -> None:
    assert Task(path).name == path.stem


@pytest.mark.parametrize(
    ("number", "text", "line", "says"),
    [
        (1, "nam: triage", 1, ["field 'nam' is not known", "Did you mean 'name'?"]),
        (17, "cleanin:", 17, ["field 'cleanin' is not known", "Did you mean 'cleaning'?", "Valid here: cleaning,"]),
        (18, "  min_char: 5", 18, ["field 'cleaning.min_char' is not known", "Did you mean 'min_chars'?"]),
        (7, "    ulr: x", 7, ["field 'sources.0.ulr' is not known", "Did you mean 'url'?"]),
        (7, "    registry: npm", 7, ["field 'sources.0.registry' is not known", "Valid here: encoding, event_time"]),
        (9, "    registri: npm", 9, ["field 'sources.1.registri' is not known", "Did you mean 'registry'?"]),
        (7, "    encoding: utf-8", 6, ["field 'sources.0.url' is missing", "Add it"]),
        (6, "  - label: a", 6, ["field 'sources.0.kind' is missing", "Add it: feedback, files, package"]),
        (6, "  - kind: file", 6, ["field 'sources.0.kind' is 'file'", "Did you mean 'files'?"]),
        (9, "    registry: nmp", 9, ["field 'sources.1.registry' is 'nmp'", "'npm' or 'pypi'", "Did you mean 'npm'?"]),
        (2, "type: text-clasification", 2, ["field 'type' is", "'text-classification'", "Did you mean"]),
        (12, "    integrity: md5-AAAA", 12, ["field 'sources.1.integrity' is 'md5-AAAA'", "such as sha512-<base64>"]),
        (11, "    version: 1.0", 11, ["field 'sources.1.version' is 1.0", "a valid string"]),
        (18, "  min_chars: few", 18, ["field 'cleaning.min_chars' is 'few'", "a valid integer"]),
        (18, "  min_chars: 0", 18, ["field 'cleaning.min_chars' is 0", "greater than or equal to 1"]),
        (18, "  min_chars: 30000", 18, ["field 'cleaning.min_chars'", "more than max_chars, 20000"]),
        (21, "    acuracy: 0.9", 21, ["field 'gates.thresholds.acuracy'", "Did you mean 'accuracy'?"]),
        (21, "    accuracy: .nan", 21, ["field 'gates.thresholds.accuracy' is nan", "finite number"]),
        (3, "labels: [ham]", 3, ["field 'labels' is ['ham']", "at least 2 items"]),
        (3, "labels: [ham, spam, ham]", 3, ["field 'labels'", "distinct labels"]),
        (3, "labels: [ham, 1]", 3, ["field 'labels.1' is 1", "a valid string"]),
        (3, "labels: ham", 3, ["field 'labels' is 'ham'", "a valid list"]),
        (15, "      good: hma", 15, ["field 'sources.1.folders.good'", "`labels` does not list 'hma'"]),
        (1, "name: ../x", 1, ["field 'name' is '../x'", "lower-case letters, digits and inner hyphens"]),
        (1, "name: Triage", 1, ["field 'name' is 'Triage'", "lower-case letters"]),
        (1, "name: " + "a" * 64, 1, ["field 'name'", "1 to 63"]),
        (1, "name: a\ntenant: a.b", 2, ["field 'tenant' is 'a.b'"]),
        (7, "    url: a\n    event_time: t\n    since: 2002-13-01", 9, ["field 'sources.0.since'", "date"]),
        (7, "    url: a\n    since: 2002-01-01", 8, ["field 'sources.0.since'", "needs event_time"]),
        (
            13,
            "    format: mail\n    since: 2002-08-01\n    until: 2002-08-01",
            15,
            ["field 'sources.1.until'", "leaves no day after since"],
        ),
        (17, "search: {trials: 3}\ncleaning:", 17, ["field 'search.trials'", "needs learning_rate, rank"]),
        (17, "search: {trials: 3, rank: []}\ncleaning:", 17, ["field 'search.rank'", "distinct choices"]),
        (17, "search: {learning_rate: [0.1, 0.01]}\ncleaning:", 17, ["'search.learning_rate'", "lowest < highest"]),
        (21, "    accuracy: 1.85", 21, ["field 'gates.thresholds.accuracy' is 1.85", "less than or equal to 1"]),
        (17, "split: {method: random}\ncleaning:", 17, ["field 'split.method' is 'random'", "'hash' or 'time'"]),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_was_expected(
    refused: Refused, number: int, text: str, line: int, says: list[str]
) -> None:
    # where a line that is needed was replaced, its loss is reported beside the mistake
    message = str(refused(changed((number, text))))
    reported = [part for part in message.splitlines() if f"triage.yaml:{line}: " in part and says[0] in part]
    assert reported, message
    for expected in says:
        assert expected in reported[0], message


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_missing_field_is_named(refused: Refused, number: int) -> None:
    field = LINES[number - 1].partition(":")[0]
    error = refused(changed((number, "")))
    assert (error.what, error.mend) == (f"field '{field}' is missing", "Add it")
    assert error.where.endswith("triage.yaml:1")


def test_all_problems_are_listed_at_once(refused: Refused) -> None:
    error = refused(changed((1, "nme: triage"), (9, "    registry: nmp"), (18, "  min_chars: few")))
    first, *problems = str(error).splitlines()
    assert "4 problems" in first
    lines = sorted(problem.split("triage.yaml:")[1].split(":")[0] for problem in problems)
    assert lines == ["1", "1", "18", "9"]
    for expected in ("'name' is missing", "'nme' is not known", "Did you mean 'npm'?", "a valid integer"):
        assert expected in str(error)


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"", 1, "the file is empty"),
        (b"# only a comment\n", 1, "the file is empty"),
        (b"- a\n- b\n", 1, "holds no mapping"),
        (b"just words\n", 1, "holds no mapping"),
        (b"name: a\nlabels: [ham\nrecipe: x\n", 3, "not valid YAML"),
        (b"name: a\n\tlabels: b\n", 2, "not valid YAML"),
        (b"name: a\nname: b\n", 2, "duplicate key"),
        (b"name: a\ncleaning:\n  pii: []\n  pii: []\n", 4, "duplicate key"),
        (b"name: a\n---\nname: b\n", 2, "not valid YAML"),
        (b"name: a\nlabels: \x00\n", 2, "U+0000 is not allowed"),
        (b"name: a\ndescription: caf\xe9\n", 2, "byte 24 (0xe9) is not UTF-8"),
        (b"\xef\xbb\xbfname: a\n\xff\n", 2, "byte 11 (0xff) is not UTF-8"),
        (b"name: a\nlabels: *missing\n", 2, "undefined alias"),
        (b"name: " + b"[" * 1_500, 1, "nested too deeply"),
        (b"name: !!python/object/apply:os.system [x]\n", 1, "field 'name'"),
    ],
)
def test_what_is_no_task_file_at_all(refused: Refused, content: bytes, line: int, says: str) -> None:
    message = str(refused(content))
    assert f"triage.yaml:{line}: " in message
    assert says in message


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "triage.yaml").write_text("\ufeff" + changed(), encoding="utf-8")
    assert Task(tmp_path / "triage.yaml").name == "triage"


def test_a_file_that_is_not_there_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file"):
        Task(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SpecError, match="this is a folder"):
        Task(tmp_path / "folder.yaml")


def test_folders_give_the_valid_tasks_and_the_errors_of_the_others(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, name, text in (
        (one, "a.yaml", changed()),
        (one, "broken.yaml", "name: [\n"),
        (other, "again.yaml", changed()),
        (other, "acme.yaml", changed((1, "name: triage\ntenant: acme"))),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    folders = TaskFolders([one, other, tmp_path / "none"])
    tasks, errors = folders.load()
    assert sorted(tasks) == ["acme.triage", "triage"]
    assert tasks["triage"].path == one / "a.yaml"
    assert [error.where for error in errors] == [f"{one}/broken.yaml:2", str(other / "again.yaml")]
    assert f"'triage' is declared already in {one / 'a.yaml'}" in errors[1].what
    assert "tenant" in errors[1].mend
    assert folders.get("acme.triage").path == other / "acme.yaml"
    with pytest.raises(SpecError, match="not valid YAML"):
        folders.get("broken")
    with pytest.raises(SpecError, match="there is no task 'triag'") as caught:
        folders.get("triag")
    assert caught.value.mend == "Did you mean 'triage'? Known tasks: acme.triage, triage."
    with pytest.raises(SpecError, match="Known tasks: none"):
        TaskFolders([tmp_path / "none"]).get("triage")


GENERATION = """\
name: support
type: text-generation
recipe: chat-lora@1
system: Be brief.
sources:
  - kind: files
    url: "*.jsonl"
    layout: chat
""".splitlines()
EXTRACTION = """\
name: bills
type: extraction
recipe: chat-lora@1
instruction: Read the bill.
fields:
  sender: {type: string, description: who wrote it}
  currency:
    type: string
    enum: [EUR, USD]
    required: false
sources:
  - kind: files
    url: "*.jsonl"
""".splitlines()

SAMPLES = "serving:\n  test_requests:\n    - "
ASKED = "field 'serving.test_requests.0"


def test_tasks_of_the_other_types(tmp_path: Path) -> None:
    for name, lines in (("support", GENERATION), ("bills", EXTRACTION)):
        (tmp_path / f"{name}.yaml").write_text("\n".join(lines), encoding="utf-8")
    support, bills = (Task(tmp_path / f"{name}.yaml").spec for name in ("support", "bills"))
    assert (support.labels, support.fields, support.system) == ([], {}, "Be brief.")
    assert list(bills.fields) == ["sender", "currency"]
    assert bills.fields["currency"].enum == ["EUR", "USD"]
    assert bills.fields["sender"].required and not bills.fields["currency"].required
    assert support.gates.thresholds == bills.gates.thresholds == {}
    assert support.gates.min_test_rows == 20


@pytest.mark.parametrize(
    ("lines", "number", "text", "line", "says"),
    [
        (GENERATION, 4, "labels: [a, b]", 4, ["field 'labels'", "for tasks of type text-classification"]),
        (GENERATION, 4, "fields: {a: {type: string}}", 4, ["field 'fields'", "for tasks of type extraction"]),
        (GENERATION, 4, "instruction: x", 4, ["field 'instruction'", "type extraction, this one's is text-generation"]),
        (GENERATION, 2, "type: text-generaton", 2, ["field 'type'", "Did you mean 'text-generation'?"]),
        (GENERATION, 8, "    layout: chats", 8, ["field 'sources.0.layout' is 'chats'", "Did you mean 'chat'?"]),
        (GENERATION, 8, "    layout: alpaca\n    text: q", 9, ["field 'sources.0.text'", "names its columns itself"]),
        (GENERATION, 8, "    format: jsn", 8, ["field 'sources.0.format' is 'jsn'", "Did you mean 'json'?"]),
        (EXTRACTION, 4, "system: x", 4, ["field 'system'", "for tasks of type text-generation"]),
        (EXTRACTION, 13, "    url: a\n    layout: pair", 14, ["field 'sources.0.layout'", "type text-generation"]),
        (
            EXTRACTION,
            6,
            "  sender: {typ: string}",
            6,
            ["field 'fields.sender.typ' is not known", "Did you mean 'type'?"],
        ),
        (EXTRACTION, 6, "  sender: {type: text}", 6, ["field 'fields.sender.type' is 'text'", "'string', 'number'"]),
        (EXTRACTION, 6, "  sender: {required: false}", 6, ["field 'fields.sender.type' is missing", "Add it"]),
        (EXTRACTION, 6, "  'se/nder': {type: string}", 6, ["field 'fields.se/nder'", "are a field's name"]),
        (EXTRACTION, 9, "    enum: [EUR, EUR]", 9, ["field 'fields.currency.enum'", "distinct values of type string"]),
        (EXTRACTION, 8, "    type: integer", 9, ["field 'fields.currency.enum'", "distinct values of type integer"]),
        (
            LINES,
            7,
            "    url: a\n    layout: chat",
            8,
            ["field 'sources.0.layout'", "this one's is text-classification"],
        ),
        (LINES, 4, "recipe: r@1\nsystem: x", 5, ["field 'system'", "type text-generation"]),
        (LINES, 3, "", 1, ["field 'labels'", "at least two"]),
        (
            GENERATION,
            4,
            "gates: {latency_p95_ms: 9}",
            4,
            ["field 'gates.latency_p95_ms'", "for tasks of type text-classification, this one's is text-generation"],
        ),
        (
            GENERATION,
            4,
            "gates: {thresholds: {accuracy: 0.5}}",
            4,
            ["field 'gates.thresholds.accuracy'", "a task of type text-generation has exact_match, token_f1"],
        ),
        (
            EXTRACTION,
            4,
            "gates: {max_loss_increase: 1}",
            4,
            ["field 'gates.max_loss_increase'", "type text-generation"],
        ),
        (EXTRACTION, 4, "serving: {review_below: 0.5}", 4, ["field 'serving.review_below'", "text-classification"]),
        (EXTRACTION, 4, SAMPLES + "{text: x, label: EUR}", 6, [f"{ASKED}.label'", "for tasks of type text-class"]),
        (EXTRACTION, 4, SAMPLES + "{text: x, fields: {sendr: Ada}}", 6, [f"{ASKED}.fields.sendr'", "sender, currency"]),
        (EXTRACTION, 4, SAMPLES + "{text: x, fields: {sender: 3}}", 6, [f"{ASKED}.fields.sender'", "3 is no string"]),
        (
            EXTRACTION,
            4,
            SAMPLES + "text: x\n      fields:\n        sender: Ada\n        currency: GBP",
            9,
            [f"{ASKED}.fields.currency'", "'GBP' is not one of its values"],
        ),
        (GENERATION, 4, SAMPLES + "{text: x, fields: {a: b}}", 6, [f"{ASKED}.fields'", "for tasks of type extraction"]),
        (GENERATION, 4, SAMPLES + "{text: x}", 6, [f"{ASKED}'", "what the answer must be: add contains"]),
        (GENERATION, 4, SAMPLES + "{text: x, contains: ''}", 6, [f"{ASKED}.contains'", "at least 1 character"]),
        (LINES, 17, SAMPLES + "{text: x, contains: y}\ncleaning:", 19, [f"{ASKED}.contains'", "or extraction, this"]),
        (LINES, 17, SAMPLES + "{text: x, label: spm}\ncleaning:", 19, [f"{ASKED}.label'", "did you mean 'spam'?"]),
        (LINES, 17, SAMPLES + "{text: ' ', label: spam}\ncleaning:", 19, [f"{ASKED}.text'", "it is blank"]),
        (LINES, 17, SAMPLES + "{label: spam}\ncleaning:", 19, [f"{ASKED}.text' is missing", "Add it"]),
        (LINES, 17, SAMPLES + "{text: x, lable: spam}\ncleaning:", 19, [f"{ASKED}.lable' is not known", "'label'?"]),
        (
            LINES,
            17,
            SAMPLES + "text: x\n      label: spam\n      contains: y\ncleaning:",
            21,
            [f"{ASKED}.contains'", "`label` says already"],
        ),
        (EXTRACTION, 4, "gates: {thresholds: {bleu: 0.5}}", 4, ["field 'gates.thresholds.bleu'", "has field_f1"]),
        (
            LINES,
            21,
            "    bleu: 0.5",
            21,
            ["field 'gates.thresholds.bleu'", "a task of type text-classification has accuracy"],
        ),
    ],
)
def test_what_belongs_to_another_type_is_named_with_its_line(
    refused: Refused, lines: list[str], number: int, text: str, line: int, says: list[str]
) -> None:
    message = str(refused("\n".join([*lines[: number - 1], text, *lines[number:]]) + "\n"))
    reported = [part for part in message.splitlines() if f"triage.yaml:{line}: " in part and says[0] in part]
    assert reported, message
    for expected in says:
        assert expected in reported[0], message


def test_an_extraction_without_fields_and_mails_for_another_type(refused: Refused) -> None:
    without = refused("\n".join([*EXTRACTION[:4], *EXTRACTION[10:]]))
    assert "field 'fields'" in without.what and "at least one field" in without.what
    assert "at least 1 item" in str(refused("\n".join([*EXTRACTION[:4], "fields: {}", *EXTRACTION[10:]])))
    mails = ["  - kind: package", *LINES[8:13]]
    error = refused("\n".join([*GENERATION[:5], *mails]))
    assert "field 'sources.0.format'" in error.what and "for text-classification" in error.what
    assert error.where.endswith("triage.yaml:11")
