"""params.yaml, a section at a time: every value is checked, and every message names the key.

Unknown keys are refused, so a mistyped one cannot be ignored. The schema of each section lies in pipeline/sections/.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from pipeline.core.stages import UserError

PARAMS_FILE = Path("params.yaml")


def number(value: Any) -> Any:
    """`-S lr=0.00005` makes DVC write `5e-05`, which YAML 1.1 reads as a string for want of a dot: take it as meant."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value


Float = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def content(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """What the file holds, unchecked. Raises UserError where it cannot be read, or is no mapping."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Run from the folder that holds params.yaml.") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:  # ValueError: no UTF-8, or 2026-02-30
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found {found!r}, wanted sections such as run, profiles and backbones.")
    return found


def json_object(path: Path, cure: str) -> dict[str, Any]:
    """What a JSON file of others holds. Raises UserError, which ends in `cure`, where that is no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}. {cure}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not keys and values, but {type(found).__name__}. {cure}")
    return found


def recorded(path: Path) -> dict[str, Any] | None:
    """What a stage wrote into a file below metrics/ that git keeps and the stage reads again; None where there is none.

    Raises UserError where the file is damaged, as by a merge.
    """
    cure = f"Take back what was recorded by `git checkout {path}`, or remove the file."
    return json_object(path, cure) if path.is_file() else None


def read(kind: Any, key: str, base: str = "") -> Any:
    """The section at a dotted `key` as `kind`, a type that pydantic knows.

    base: the key of what it differs from, in a section that `key` lies in, too; it may be missing.
    Raises UserError naming every key that is wrong, what was found and what is wanted.
    """
    whole = content()
    section = _at(whole, key)
    if base:
        above, _, name = base.rpartition(".")
        section = on_base(section, _at(whole, above).get(name), base)
    return checked(kind, section, key)


def on_base(section: Any, base: Any, key: str, path: Path = PARAMS_FILE) -> Any:
    """A section with what it does not have from `base`, which is the content of `key`; null is an empty section.

    A section that is no mapping comes back as it is. Raises UserError where the base is none.
    """
    section, base = ({} if found is None else found for found in (section, base))
    if not isinstance(base, dict):
        raise UserError(f"{path}:\n  {key}: found {base!r}, wanted keys and values.")
    return {**base, **section} if isinstance(section, dict) else section


def profile() -> str:
    """The profile at hand, which is in every path."""
    return read(Name, "run.profile")


def _at(whole: Any, key: str) -> Any:
    parts = key.split(".")
    for depth, part in enumerate(parts, 1):
        if not isinstance(whole, dict) or part not in whole:
            names = f", or name one of these: {', '.join(map(str, whole))}" if isinstance(whole, dict) else ""
            raise UserError(f"{PARAMS_FILE}:\n  {'.'.join(parts[:depth])}: missing. Add it{names}.")
        whole = whole[part]
    return whole


def checked(kind: Any, section: Any, key: str = "", path: Path = PARAMS_FILE) -> Any:
    """The content of a section as `kind`. As JSON, from which strict types take dataclasses, too."""
    try:
        text = json.dumps(section, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # a date as a key; a section that holds itself
        raise UserError(
            f"{path}: {key or 'the file'} cannot be read: {error}. Quote such a key, or remove it."
        ) from None
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise UserError("\n".join([f"{path}:", *(_explain(e, section, key) for e in error.errors())])) from None


def _explain(error: Any, content: Any, key: str) -> str:
    parts = [key] if key else []
    for part in error["loc"]:  # pydantic names the chosen kind of a section, too, as if it were a key: leave it out
        if isinstance(part, int) if isinstance(content, list) else isinstance(content, dict) and part in content:
            parts.append(str(part))
            content = content[part]
    if error["type"] == "missing":
        parts.append(str(error["loc"][-1]))
    where = ".".join(parts) or "run"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"  {where}: unknown key (found {error['input']!r}). Remove it, or correct its name."
    if error["type"] == "missing":
        return f"  {where}: missing. Add it."
    if error["type"] == "value_error":
        return f"  {where}: {error['ctx']['error']}."
    return f"  {where}: found {error['input']!r}. {error['msg']}."
