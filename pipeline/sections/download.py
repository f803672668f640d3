"""Files from elsewhere, wherever a section names some."""

from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from pipeline.core.config import Section, Sha256


def _hash(value: Any, checked: ValidatorFunctionWrapHandler) -> str | None:
    """None for the word `hub`."""
    try:
        return None if value == "hub" else checked(value)
    except ValidationError:
        wanted = "a sha256 (64 of 0-9 and a-f), or hub for the one that the hub states"
        raise ValueError(f"found {value!r}, wanted {wanted}") from None


Hash = Annotated[Sha256 | None, WrapValidator(_hash)]  # of a file; None: the one that the hub states
Address = Annotated[str, Field(pattern=r"^(https?://|hf://(datasets/)?[\w.-]+/[\w.-]+@[\w.-]+$)")]


class Download(Section):
    """Files from elsewhere. Of the addresses `at` (mirrors) the first that answers is used.

    An address is https://host/folder, hf://owner/name@revision, or hf://datasets/owner/name@revision. A mirror may name
    a file differently if its sha256 is given: on a hub the file is found by this hash. An https address with the ending
    of the only file (.pt) is taken as the address of that file.
    """

    at: list[Address] = Field(min_length=1)
    licence: str
    files: dict[str, Hash] = Field({})  # path below the address -> sha256, or the word hub
    match: list[str] = Field([])  # instead of `files`, on a hub: every file whose path fits one of these patterns

    @model_validator(mode="after")
    def _names_files(self) -> "Download":
        if bool(self.files) == bool(self.match):
            raise ValueError("wanted either files or match, and found both or none")
        if self.match and not all(address.startswith("hf://") for address in self.at):
            raise ValueError("match needs addresses that begin with hf://, because only a hub lists its files")
        for name in self.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files names '{name}', which would be written outside its folder")
        return self
