"""What `enable` puts into each layer: weights from its module as it computes, or from a checkpoint."""

from pathlib import Path
from typing import Any

from mla_fp8.integrations import projection
from mla_fp8.integrations.absorbed_layer import Fp8Layer, UnquantizedLayer
from mla_fp8.integrations.fingerprint import Fingerprint
from mla_fp8.integrations.supported import WHERE
from mla_fp8.weights.checkpoint import layers as layers_of
from mla_fp8.weights.checkpoint import tensor_files
from mla_fp8.weights.names import find_kv_b_proj

CUT = "must be one that can be cut or quantized"


def make_states(
    layers: dict[str, Any], skipped: dict[str, str], activations: str, weights: str, checkpoint: str | Path | None
) -> tuple[dict[str, Fp8Layer | UnquantizedLayer], dict[str, str]]:
    """name -> what an enabled layer holds, and name -> note; a layer that computes something else joins `skipped`."""
    states: dict[str, Fp8Layer | UnquantizedLayer] = {}
    notes: dict[str, str] = {}
    tensors = [] if checkpoint is None else tensor_names(checkpoint)
    for name, layer in layers.items():
        if name in skipped:
            continue
        module, adapted = layer.kv_b_proj, projection.is_adapted(layer.kv_b_proj)
        if checkpoint is not None and not adapted:
            state: Any = Fp8Layer.of_checkpoint(layer, checkpoint, checkpoint_name(tensors, name, layer))
        else:
            try:
                source = projection.read(module)
                reason = projection.why_not_computed(module, source)
            except projection.NotAbsorbed as error:
                reason = str(error)
            if reason is not None:
                skipped[name] = reason
                continue
            try:
                state = (UnquantizedLayer if weights == "unquantized" else Fp8Layer).of_source(layer, source)
            except ValueError as error:
                raise ValueError(f"{WHERE}: kv_b_proj of {name} {CUT}, got {error}") from error
        if adapted:
            notes[name] = f"kv_b_proj's adapters ({', '.join(module.active_adapters)}) are merged into what is absorbed"
        state.name, state.seen, state.activations = name, Fingerprint(module), activations
        states[name] = state
    return states, notes


def checkpoint_name(tensors: list[str], name: str, layer: Any) -> str:
    try:
        return find_kv_b_proj(tensors, layer.layer_idx, f"{name}.kv_b_proj")
    except LookupError as error:
        raise ValueError(f"{WHERE}: checkpoint must hold the tensors of {name}.kv_b_proj, got {error}") from error


def tensor_names(checkpoint: str | Path) -> list[str]:
    """Those of kv_b_proj where there are any, of some hundred thousand."""
    layers_of(checkpoint)  # says what is wrong with a directory
    names = list(tensor_files(Path(checkpoint)))
    return [name for name in names if ".kv_b_proj." in name] or names
