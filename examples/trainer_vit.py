"""A sparse vision transformer on the digits, trained by transformers' Trainer with checkpoints.

    python examples/trainer_vit.py --out run              # trains, a checkpoint every 20 steps
    python examples/trainer_vit.py --out run --resume     # continues from the last one

Needs transformers, accelerate and scikit-learn.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import nn
from torch.utils.data import Dataset

from qsparseprop.training.data import load_digits_data
from qsparseprop.utils.network_utils import sparsity, swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent

try:
    import accelerate  # noqa: F401 - the Trainer needs it, and says so only when it starts
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
except ImportError as error:
    raise SystemExit(f"this example needs {error.name}: pip install transformers accelerate") from error


class Images(Dataset):
    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def make_model() -> nn.Module:
    """The same network, with the same pattern, in every run: a resumed one loads its weights from the checkpoint."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(
        image_size=16, patch_size=4, num_channels=1, num_labels=10, hidden_size=64, intermediate_size=128,
        num_hidden_layers=3, num_attention_heads=4,
    ))  # fmt: skip
    layerwise_magnitude_prune(model, 0.9)  # all but the first (the patches) and the last layer
    make_pruning_permanent(model)
    # The package writes checkpoints with the names of an older version of the class, under which its Trainer finds
    # nothing when it resumes.
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return swap_modules_with_sparse(model, (16, 1, 16, 16), include_dense=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="trainer_vit", help="folder of the checkpoints (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop earlier; for a run to be resumed")
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    args = parser.parse_args()
    data = load_digits_data(size=16, channels=1)
    arguments = TrainingArguments(
        args.out, num_train_epochs=args.epochs, max_steps=args.max_steps, per_device_train_batch_size=64,
        per_device_eval_batch_size=120, learning_rate=2e-3, lr_scheduler_type="constant", save_steps=args.save_steps,
        save_total_limit=2, logging_steps=args.save_steps, report_to="none", use_cpu=True, seed=0,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        make_model(), arguments,
        train_dataset=Images(data.train_images, data.train_labels),
        eval_dataset=Images(data.test_images, data.test_labels),
        compute_metrics=lambda p: {"top1": 100 * (p.predictions.argmax(1) == p.label_ids).mean().item()},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=args.resume)
    result = trainer.evaluate()
    print(f"{trainer.state.global_step} steps, {100 * sparsity(trainer.model):.1f} % zeros, "
          f"top-1 {result['eval_top1']:.1f} %, loss {result['eval_loss']:.6f}")


if __name__ == "__main__":
    main()
