"""Rules as data, so that a backbone's differences are an entry in params.yaml; sections are checked against these."""

from dataclasses import dataclass
from typing import ClassVar, Literal

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # for whoever checks such a section


@dataclass(frozen=True)
class TokenRule:
    """Which tokens stand beside the pooled one.

    none | all | random (number of positions, with replacement) | random_fraction (number = fraction of the patches,
    rounded down, with replacement) | windows (means of consecutive windows of `number`, the remainder dropped)
    """

    kind: Literal["none", "all", "random", "random_fraction", "windows"]
    number: float = 0.0
    __pydantic_config__: ClassVar = STRICT

    def __post_init__(self) -> None:
        """Raises ValueError for a number where none is taken, for none where one is, and for one out of range."""
        if self.number < 0 or (self.kind in ("none", "all")) != (self.number == 0):
            raise ValueError(
                f"kind '{self.kind}' with number {self.number:g}: none and all take none, the others need one above 0"
            )

        if self.kind in ("random", "windows") and self.number != int(self.number):
            raise ValueError(f"kind '{self.kind}' with number {self.number:g}: wanted a whole number")
        if self.kind == "random_fraction" and self.number > 1:
            raise ValueError(f"kind 'random_fraction' with number {self.number:g}: wanted a fraction, at most 1")

    def check(self, patches: int) -> None:
        """Raises ValueError where the rule, which selects tokens, selects none of so many patches."""
        few = {"random_fraction": not self.positions(patches), "windows": self.number > patches}
        if few.get(self.kind):
            raise ValueError(
                f"kind '{self.kind}' with number {self.number:g} selects none of the tower's {patches} patches"
            )

    def positions(self, patches: int) -> int:
        """How many positions are drawn among `patches`; 0 where the rule draws none."""
        if self.kind == "random":
            return int(self.number)
        return int(self.number * patches) if self.kind == "random_fraction" else 0


@dataclass(frozen=True)
class Condition:
    """What the denoiser is conditioned on: tokens of the image, added to the text's one by one or to their mean."""

    tokens: TokenRule
    text: Literal["sequence", "mean"]
    __pydantic_config__: ClassVar = STRICT

    def fits(self, text_tokens: int) -> bool:
        """Can it be added to a text of so many tokens? Not `sequence` where the number depends on a tower's patches."""
        known = {"none": 1, "random": 1 + int(self.tokens.number)}  # the pooled token is one of them
        return self.text == "mean" or known.get(self.tokens.kind) == text_tokens


@dataclass(frozen=True)
class PoolingRule:
    """How the embedding of an image is made: pooled token + mean of the tokens that the rule selects.

    normalize_tokens: scale each token to unit length first. normalize_output: scale the sum to unit length.
    drawn_per: draw tokens anew for each statement of a pair, or once for both.
    resize_mode: how the image is resized for the tower; None: as the backbone does it.
    """

    tokens: TokenRule
    normalize_tokens: bool = False
    normalize_output: bool = True
    drawn_per: Literal["statement", "pair"] = "statement"
    resize_mode: Literal["shortest", "squash"] | None = None
    __pydantic_config__: ClassVar = STRICT


CLASS_TOKEN = Condition(TokenRule("none"), "mean")
STOCK = PoolingRule(TokenRule("none"))
