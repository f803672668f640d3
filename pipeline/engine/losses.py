"""The losses of a recipe, their settings checked."""

import json

from pydantic import TypeAdapter, ValidationError

from pipeline.core.stages import UserError
from pipeline.diva import losses
from pipeline.diva.losses import Loss
from pipeline.sections.recipe import Recipe


def losses_of(key: str, recipe: Recipe) -> list[Loss]:
    """The losses of a recipe, which params.yaml has at `key`. Raises UserError naming the key that is wrong."""
    found, known = [], losses.known()
    for loss, settings in recipe.losses.items():
        if loss not in known:
            raise UserError(f"{key}.losses.{loss} is unknown. Known: {', '.join(known)}.")
        try:
            found.append(TypeAdapter(known[loss]).validate_json(json.dumps(settings), strict=True))
        except ValidationError as error:
            wrong = (f"{'.'.join([f'{key}.losses.{loss}', *map(str, e['loc'])])} ({e['msg']})" for e in error.errors())
            raise UserError(f"{', '.join(wrong)}. Correct them in params.yaml.") from None
    return found
