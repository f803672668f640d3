"""What is known of a backbone before it is fetched: what open_clip's registry says, and its tower's sizes."""

from pipeline.core import config
from pipeline.core.stages import UserError
from pipeline.sections.download import Address, Download
from pipeline.sections.source import CheckpointSource, MiniSource, Preprocessing, RegistrySource


def complete(name: str, source: MiniSource | CheckpointSource | RegistrySource) -> MiniSource | CheckpointSource:
    """A source in full, of which params.yaml may name model, tag and pins alone; name: the backbone's. Asks no server.

    Raises UserError where the registry does not have the model, the tag or an address, and for one that is none.
    """
    if not isinstance(source, RegistrySource):
        return source
    import open_clip  # not above: it takes seconds, for which a plan of the mini world need not wait

    key = f"backbones.{name}.source"
    if not (tags := open_clip.list_pretrained_tags_by_model(source.model)):
        raise UserError(f"{key}.model: open_clip's registry has no weights of '{source.model}'. Correct the name.")
    if source.tag not in tags:
        raise UserError(
            f"{key}.tag: open_clip's registry has no '{source.tag}' of {source.model}. Name one of: {', '.join(tags)}."
        )
    known = open_clip.get_pretrained_cfg(source.model, source.tag)
    repository = "/".join(known.get("hf_hub", "").split("/")[:2])  # of some entries the file's name follows
    url = known.get("url", "").rpartition("/")[0]
    if not (repository if source.revision else url):
        has = "an address outside the hub. Remove it" if url else "only a repository on the hub. Name a commit"
        raise UserError(f"{key}.revision is {source.revision}, but open_clip's registry has {has}.")
    if source.revision:
        url = config.checked(Address, f"hf://{repository}@{source.revision}", f"{key}.revision")
    files = {"at": [url, *source.mirrors], "licence": source.licence}
    tokenizer = None
    if source.tokenizer:
        tokenizer = config.checked(Download, {**files, "files": source.tokenizer}, f"{key}.tokenizer")
    return CheckpointSource(
        kind="checkpoint",
        architecture=source.model,
        preprocessing=Preprocessing(
            mean=list(known["mean"]), std=list(known["std"]),
            interpolation=known["interpolation"], resize_mode=known["resize_mode"],
        ),
        weights=config.checked(Download, {**files, "files": source.files}, f"{key}.files"),
        tokenizer=tokenizer,
    )  # fmt: skip


def embedding_width(name: str, source: MiniSource | CheckpointSource | RegistrySource) -> int:
    """Of a backbone, by its configuration. Raises UserError for an architecture that open_clip does not know, and for
    a configuration of one's own that makes no model."""
    architecture = complete(name, source).architecture
    if isinstance(architecture, str):
        from pipeline.models.backbones import model_config  # not above: it imports open_clip

        try:
            architecture = model_config(architecture)
        except UserError as error:
            raise UserError(f"backbones.{name}.source: {error}. Correct the name.") from None
    if "embed_dim" not in architecture:
        raise UserError(f"backbones.{name}.source.architecture: embed_dim, its embedding's width, is missing. Add it.")
    if isinstance(source, CheckpointSource) and isinstance(source.architecture, dict):
        from pipeline.models.backbones import on_meta

        try:
            on_meta(source.architecture)
        except UserError as error:
            raise UserError(f"backbones.{name}.source: {error}") from None
    return architecture["embed_dim"]


def patches(source: MiniSource | CheckpointSource) -> int:
    """How many patch tokens the image tower of a source in full has."""
    architecture = source.architecture
    if isinstance(architecture, dict) and not {"patch_size", "image_size"} - architecture["vision_cfg"].keys():
        vision = architecture["vision_cfg"]  # for a plan of the mini world need not wait for torch
        return (vision["image_size"] // vision["patch_size"]) ** 2
    import torch

    from pipeline.models.backbones import image_tokens, model_config, on_meta

    config = model_config(architecture)
    size = config["vision_cfg"]["image_size"]
    with torch.device("meta"):
        return image_tokens(on_meta(config).visual, torch.empty(1, 3, size, size))[1].shape[1]
