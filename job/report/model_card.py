"""The model card of an adapter, `adapter/README.md`, as model hubs show it.

All of it comes from the results of the run: scores with intervals and trivial baselines. The
license is that of the base model, from its own card or as far as its name tells.
"""

import contextlib
import re
from pathlib import Path
from typing import Any

import yaml

from job.report.caveats import caveats, trivial_baselines, warnings
from job.report.render import template_environment
from job.results import Results
from job.spec.fields import BUILT_PRESETS

PEFT_CONFIG = "adapter/peft/adapter_config.json"
_HUB = "hf://"
_GEMMA_LICENSES = {1: "gemma", 2: "gemma", 3: "gemma", 4: "apache-2.0"}


def render_card(results: Results) -> str:
    """Render the card: YAML front matter for the hub, then Markdown."""
    has_peft = any(item.path == PEFT_CONFIG for item in results.artifacts)
    front = yaml.safe_dump(_front(results, has_peft), sort_keys=False, width=10_000)
    body = (
        template_environment(html=False)
        .get_template("card.md.j2")
        .render(
            results=results,
            spec=results.run.model_dump(mode="json")["spec"],
            license=results.model.license or license_of(results.model.preset),
            caveats=[*warnings(results), *caveats(results)],
            trivial_baselines=trivial_baselines,
            has_peft=has_peft,
            built_presets=BUILT_PRESETS,
        )
    )
    return f"---\n{front}---\n\n{body}"


def license_in(card: Path) -> str:
    """Return the license that the base model's own card names, or ''."""
    from huggingface_hub import metadata_load

    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        license_ = (metadata_load(card) or {}).get("license")
        return license_ if isinstance(license_, str) else ""
    return ""


def license_of(preset: str) -> str:
    """Return the license of a model as hubs name it; `other` if its name does not tell."""
    name = preset.rstrip("/").rpartition("/")[2].lower()
    if not name.startswith("gemma"):
        return "other"
    # The number in gemma-2b is a size: it is the first Gemma.
    version = re.match(r"gemma[-_]?(\d+)(?![\d.]*b)", name)
    return _GEMMA_LICENSES.get(int(version[1]) if version else 1, "other")


def _front(results: Results, has_peft: bool) -> dict[str, Any]:
    front: dict[str, Any] = {}
    preset, dataset = results.model.preset, results.data.dataset
    if preset.startswith(_HUB):
        front |= {"base_model": preset.removeprefix(_HUB), "base_model_relation": "adapter"}
    front["library_name"] = "peft" if has_peft else "keras-hub"
    front["pipeline_tag"] = "text-generation"
    front["license"] = results.model.license or license_of(preset)
    front["tags"] = ["lora", "keras-hub", *(["peft"] if has_peft else [])]
    if dataset.startswith(_HUB):
        front["datasets"] = [dataset.removeprefix(_HUB)]
    return front
