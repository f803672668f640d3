"""Zero-shot classification and retrieval, by clip-benchmark's rules."""

import pandas as pd
import torch
from clip_benchmark.metrics import zeroshot_retrieval

from pipeline.benchmarks.encoder import Encoder
from pipeline.benchmarks.sets import BenchmarkSet, answers


def classification(encoder: Encoder, found: BenchmarkSet) -> pd.DataFrame:
    """Zero-shot classification: is the most similar class the right one? One row per image."""
    classifier_DC, chosen = encoder.classifier(found), []
    for number, _, images_BD in encoder.images(found):
        chosen.append((number, (100 * images_BD @ classifier_DC).argmax(1).cpu()))
    labels = [sample.label for sample in found.splits["test"]]
    return answers("accuracy", torch.cat(encoder.of_all(chosen)) == torch.tensor(labels))


def retrieval(encoder: Encoder, found: BenchmarkSet, recall: int) -> pd.DataFrame:
    """Retrieval in both directions: is a right answer among the first `recall`? One row per query.

    clip_benchmark's evaluate gives only the means of these rows. Here each query keeps the number of its image, because
    an image and its texts are one sample of the bootstrap.
    """
    parts = []
    for number, samples, images_BD in encoder.images(found):
        texts_ND = encoder.embed([caption for sample in samples for caption in sample.label])
        parts.append((number, (images_BD.cpu(), texts_ND.cpu())))
    images, texts = (torch.cat(part) for part in zip(*encoder.of_all(parts), strict=True))
    of_text = [image for image, sample in enumerate(found.splits["test"]) for _ in sample.label]
    scores = texts @ images.T
    belongs = torch.zeros_like(scores, dtype=torch.bool)
    belongs[torch.arange(len(scores)), of_text] = True

    def right(scores: torch.Tensor, belongs: torch.Tensor) -> torch.Tensor:
        args = (zeroshot_retrieval.recall_at_k, scores, belongs, encoder.batch, encoder.processes.device.type)
        return zeroshot_retrieval.batchify(*args, k=recall) > 0

    return pd.concat(
        [
            answers("image_to_text", right(scores.T, belongs.T)),
            answers("text_to_image", right(scores, belongs), of_text),
        ]
    )
