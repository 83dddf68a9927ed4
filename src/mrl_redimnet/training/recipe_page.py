"""Writes docs/recipe.md, the reference of all settings, from their descriptions.

python -m mrl_redimnet.training.recipe_page docs/recipe.md
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from mrl_redimnet.extras import extra
from mrl_redimnet.training.reading import GROUPS, RENAMED, shown_default, shown_values
from mrl_redimnet.training.recipe import LOSS_FIELDS, EvaluationSet

with extra("train"):
    from pydantic.fields import FieldInfo

HEAD = """# Settings of a training run

<!-- Generated, not written by hand: python -m mrl_redimnet.training.recipe_page docs/recipe.md -->

A recipe is a YAML file of groups. A setting that it does not name has its default. On the command line a setting is
given by its full name or by the last part of it, and its value is read as YAML:

```yaml
model: {start: runs/b2/best, finetune: adapter}
adapter:
  rank: 4
```

```bash
accelerate launch train_hf.py RECIPE.yaml --adapter.rank 4     # the same as --rank 4
```

A group that is given as one value stands for its main setting: `model: nano` is `model: {start: nano}`, `loss: aam` is
`loss: {name: aam}`; so do `--optimizer sgd` (algorithm) and `--schedule cosine` (lr_schedule).
"""

EARLIER = """
## Names of earlier versions

Recipes of earlier versions had no groups. Settings that are not in this table have kept their names, within a group.
Runs that an earlier version began are resumed with the recipe of today's names.
"""


def page() -> str:
    """The page's text, Markdown."""
    parts = [HEAD]
    for name, kind in GROUPS.items():
        parts += [f"\n## {name}\n", inspect.cleandoc(kind.__doc__ or ""), "", *_table(kind.model_fields)]
        if name == "evaluation":
            parts += ["\nOf each of `tests`:\n", *_table(EvaluationSet.model_fields)]
    parts += [EARLIER, "| earlier | now |", "|---|---|"]
    parts += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    parts += [f"| `model_options.{old}` | `loss.{new}` |" for old, new in LOSS_FIELDS.items()]
    return "\n".join(parts) + "\n"


def _table(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    yield from ("| setting | default | values | meaning |", "|---|---|---|---|")
    for name, field in fields.items():
        default = "" if field.is_required() else f"`{shown_default(field)}`"
        cells = (f"`{name}`", default, shown_values(field), field.description or "")
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
