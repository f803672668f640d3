"""Zero-shot classification and retrieval, by clip-benchmark's own functions."""

import warnings
from pathlib import Path

import pandas as pd
import torch
from clip_benchmark.datasets.builder import build_dataset
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from pipeline.benchmarks.sets import answers
from pipeline.core.stages import progress


def classification(backbone, root: Path, name: str, batch: int, device: torch.device) -> pd.DataFrame:
    """Zero-shot classification: whether the top class is right, one row per image."""
    dataset, loader = _load(backbone, root, name, "zeroshot_classification", batch)
    classifier = zeroshot_classification.zero_shot_classifier(
        backbone, backbone.tokenizer, dataset.classes, dataset.templates, device.type, amp=False
    )
    logits, labels = zeroshot_classification.run_classification(backbone, classifier, loader, device.type, amp=False)
    return answers("accuracy", logits.argmax(1) == labels)


@torch.no_grad()
def retrieval(backbone, root: Path, name: str, batch: int, recall: int, device: torch.device) -> pd.DataFrame:
    """Retrieval in both directions: whether a right answer is among the first `recall`, one row per query.

    clip_benchmark's evaluate gives only the means of these rows. Here each query keeps the number of its image, because
    an image and its texts are one sample of the bootstrap.
    """
    _, loader = _load(backbone, root, name, "zeroshot_retrieval", batch)
    images, texts, of_text = [], [], []
    for pixels, captions, numbers in progress(zeroshot_retrieval.dataloader_with_indices(loader), name):
        images.append(normalize(backbone.encode_image(pixels.to(device)), dim=-1).cpu())
        ids = backbone.tokenizer([caption for own in captions for caption in own]).to(device)
        texts.append(normalize(backbone.encode_text(ids), dim=-1).cpu())
        of_text += [number for number, own in zip(numbers.tolist(), captions, strict=True) for _ in own]
    scores = torch.cat(texts) @ torch.cat(images).T
    belongs = torch.zeros_like(scores, dtype=torch.bool)
    belongs[torch.arange(len(scores)), of_text] = True

    def found(scores: torch.Tensor, belongs: torch.Tensor) -> torch.Tensor:
        args = (zeroshot_retrieval.recall_at_k, scores, belongs, batch, device.type)
        return zeroshot_retrieval.batchify(*args, k=recall) > 0

    return pd.concat(
        [
            answers("image_to_text", found(scores.T, belongs.T)),
            answers("text_to_image", found(scores, belongs), of_text),
        ]
    )


def _load(backbone, root: Path, name: str, task: str, batch: int):
    with warnings.catch_warnings():  # clip_benchmark leaves webdataset's shard shuffling at its default, which is off
        warnings.filterwarnings("ignore", message=".*shardshuffle.*")
        dataset = build_dataset(f"wds/{name}", root=str(root / "wds" / name), transform=backbone.preprocess, task=task)
    return dataset, DataLoader(dataset.batched(batch), batch_size=None, num_workers=0)
