"""Task files: checked with all they name, and added to a platform."""

import io
from pathlib import Path

from ft_assets.home import Home
from ft_assets.tasks import FilesSource, Task
from ft_assets.training import recipes
from ft_assets.training.continuing import check_incremental
from ft_assets.training.searching import trials as search
from ft_resources.base_models import resolve as resolve_base
from ft_resources.errors import SpecError
from ft_resources.lake import Lake


def check(lake: Lake, path: str | Path) -> tuple[Task, recipes.Merged]:
    """See `Platform.check_task`."""
    task = Task(Path(path))
    resolved = recipes.resolve(task)
    recipes.require_published(lake, resolved.template, publish=False)
    search.check_space(task, resolved)
    check_incremental(task, resolved)
    if isinstance(resolved, recipes.Plugged):
        resolved.plugin.packages()
    else:
        resolve_base(recipes.of_transformers(resolved).settings.base.model)
    return task, resolved


def add(home: Home, path: str | Path) -> Task:
    """See `Platform.add_task`."""
    task, _ = check(home.lake, path)
    target = home.environment.home / "tasks" / f"{task.name}.yaml"
    known = home.tasks.load()[0].get(task.name)
    if known is not None and known.path.resolve() not in (target.resolve(), task.path.resolve()):
        raise SpecError(f"task '{task.name}' is declared already in {known.path}", where=str(path), mend="Rename it.")
    if known is None or known.path.resolve() == target.resolve() != task.path.resolve():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_with_absolute_urls(task), encoding="utf-8")
    home.instance.add_dynamic_partitions("task", [task.name])
    home.ledger.audit(home.environment.actor, "add_task", task.name, task.path.name, {})
    return home.tasks.get(task.name)


def _with_absolute_urls(task: Task) -> str:
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.width = 1_000_000  # keep every line where it is: errors and origins name lines
    root = task.file.root
    for source, spec in zip(root["sources"], task.spec.sources, strict=True):
        if isinstance(spec, FilesSource) and "://" not in spec.url and not Path(spec.url).is_absolute():
            source["url"] = str(task.path.parent.resolve() / spec.url)
    text = io.StringIO()
    yaml.dump(root, text)
    return text.getvalue()
