"""A sparse network in Lightning: python examples/lightning_sparse.py [--devices 2]

Trains a pruned and swapped network on the digits, saves checkpoints, and loads the last one again. With two devices
Lightning starts a second process, and DistributedDataParallel averages the gradients. Needs lightning and scikit-learn.
"""

import argparse

import torch
import torch.distributed.nn  # before there is a process group: it keeps the one that it finds
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qsparseprop import layerwise_magnitude_prune, make_pruning_permanent, swap_modules_with_sparse
from qsparseprop.training.data import load_digits_data


class SparseDigits(LightningModule):
    """A network of which `sparsity` of the weights are zero, for digits of 16 x 16 pixels."""

    def __init__(self, sparsity: float = 0.9, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 64, 10),
        )  # fmt: skip
        layerwise_magnitude_prune(self.network, sparsity)
        make_pruning_permanent(self.network)
        # include_dense=False times nothing, so that all processes come to the same network; so does a checkpoint's,
        # whatever its pattern
        swap_modules_with_sparse(self.network, (64, 3, 16, 16), include_dense=False, fuse=True, verbose=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("top1", 100 * (self(images).argmax(1) == labels).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", default="lightning", help="folder of the checkpoints (default: %(default)s)")
    args = parser.parse_args()
    seed_everything(0, verbose=False)
    data = load_digits_data(16)
    train = DataLoader(TensorDataset(data.train_images, data.train_labels), 64 // args.devices, shuffle=True)
    test = DataLoader(TensorDataset(data.test_images, data.test_labels), 64)
    trainer = Trainer(
        accelerator="cpu", devices=args.devices, strategy="ddp" if args.devices > 1 else "auto",
        max_epochs=args.epochs, default_root_dir=args.out, logger=False, enable_progress_bar=False,
        callbacks=[ModelCheckpoint(dirpath=args.out, filename="digits", enable_version_counter=False)],
    )  # fmt: skip
    trainer.fit(SparseDigits(), train, test)
    if trainer.is_global_zero:
        print(f"top-1 {trainer.callback_metrics['top1']:.2f} %", flush=True)
        loaded = SparseDigits.load_from_checkpoint(f"{args.out}/digits.ckpt").eval()
        with torch.no_grad():
            top1 = 100 * (loaded(data.test_images).argmax(1) == data.test_labels).float().mean()
        print(f"top-1 {top1:.2f} % of the loaded checkpoint, {trainer.global_step} steps", flush=True)


if __name__ == "__main__":
    main()
