"""What a run of `run_training` gives: as a table, and as JSON."""

from __future__ import annotations

from typing import Any

from .finetuner import LayerTime, layer_table

__all__ = ["format_result", "without_nan"]


def format_result(result: dict[str, Any]) -> str:
    """Return what the ``finetune`` command prints of a result of `run_training`."""
    config = result["config"]
    rows = [
        ("top-1", f"{result['top1']:.1f} % (best {result['best_top1']:.1f} %, before pruning "
                  f"{result['dense_top1']:.1f} %, right after {result['pruned_top1']:.1f} %)"),
        ("zeros", f"{100 * result['model_sparsity']:.1f} % of the weights of all layers"),
        ("sparse layers", str(len(result.get("replaced_layers", [])))),
        ("time", f"{result['step_ms']:.1f} ms a step (median), {result['train_s']:.1f} s for {result['steps']} steps "
                 f"of {config['batch_size'] * config['accumulate']} images"),
        ("waiting for data", f"{100 * result['data_wait_share']:.1f} % of the time of training"),
        *([("gradients sent", f"{result['sent_mb']:.2f} MB a step by each of {result['processes']} processes")]
          if "sent_mb" in result else []),
        ("saved for backward", f"{result['saved_mb']:.1f} MB"),
        ("peak memory", f"{result['peak_rss_mb']:.0f} MB, of which {result['rss_before_training_mb']:.0f} MB before "
                        "the training"),
    ]  # fmt: skip
    lines = [f"{name:<20}{value}" for name, value in rows]
    if result["layer_times"]:
        lines += ["", layer_table([LayerTime(**t) for t in result["layer_times"]], 20)]
    return "\n".join(lines)


def without_nan(value: Any) -> Any:
    """JSON knows no NaN: a figure that the system does not tell becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
