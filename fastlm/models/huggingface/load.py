"""`from_pretrained`: a folder of config.json and safetensors into a GPT, one tensor at a time."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from fastlm.models.config import GPTConfig
from fastlm.models.encoder import Encoder, EncoderConfig
from fastlm.models.gpt import GPT
from fastlm.models.huggingface.configs import config_from_huggingface
from fastlm.models.huggingface.encoder_configs import ENCODERS, encoder_config_from_huggingface
from fastlm.models.huggingface.names import Source, bare, is_ignored, rename_old, sources
from fastlm.models.lstm import LSTMLM
from fastlm.models.lstm import MODEL_TYPE as LSTM_TYPE
from fastlm.nn.meta import allocate, without_weights

Model = TypeVar("Model", GPT, Encoder)
WEIGHTS = "model.safetensors"
ADAPTER = "adapter"  # LoRA adapters in a model folder of fastlm's own format
INDEX = "model.safetensors.index.json"
HOW_TO_DOWNLOAD = (
    "fastlm downloads nothing; `hf download NAME --local-dir FOLDER` (of the package huggingface_hub) does"
)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """The errors within it begin with the folder's name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> GPT:
    """Load a model folder of Hugging Face's (GPT-2, Llama, Mistral, Qwen2, Qwen3 or Phi-3) or of fastlm's own format.

    Args:
        path: the folder. Nothing is downloaded.
        dtype: of the parameters; "auto": as stored.
        device: where to load to. At no time is there a second copy of the weights, only of one tensor.
        changes: fields of GPTConfig to change, e.g. `dropout=0.1` for fine-tuning.

    Returns:
        The model, in evaluation mode (call `.train()` to train it).

    Raises:
        FileNotFoundError: there is no such folder, or config.json, the weights or some of their shards are missing.
        ValueError: another architecture, an option that fastlm does not have, tensors that are missing, unknown or of
            a wrong shape or dtype, a truncated file, or weights in pickle files only.
    """
    folder = Path(path)
    fields = read_config(folder)
    with _naming(folder):
        config = GPTConfig.from_dict({**config_from_huggingface(fields).to_dict(), **changes})
    with ExitStack() as stack:
        checkpoint = _Checkpoint(folder, stack, fields["model_type"])
        with without_weights():
            model = GPT(config)
        model.read_from = fields["model_type"]
        return checkpoint.fill(model, dtype, device)


def encoder_from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    **changes: Any,
) -> Encoder:
    """Load a folder of BERT's or RoBERTa's, or an encoder of fastlm's own format; arguments as `from_pretrained`.

    Whether it has a head for masked prediction and a pooler is seen from its tensors. Raises as `from_pretrained`.
    """
    folder = Path(path)
    fields = read_config(folder)
    with ExitStack() as stack:
        checkpoint = _Checkpoint(folder, stack, fields.get("model_type", ""))
        held = checkpoint.tensors.keys()
        with _naming(folder):
            config = encoder_config_from_huggingface(
                fields,
                mlm_head=not held.isdisjoint(("cls.predictions.transform.dense.weight", "lm_head.dense.weight")),
                pooler="pooler.dense.weight" in held,
            )
        with without_weights():
            model = Encoder(EncoderConfig.from_dict({**config.to_dict(), **changes}))
        return checkpoint.fill(model, dtype, device)


def model_from_pretrained(path: str | os.PathLike[str], **options: Any) -> GPT | Encoder | LSTMLM:
    """Load what config.json says is there: a causal model, an encoder or an LSTM."""
    if read_config(Path(path)).get("model_type") in ENCODERS:
        return encoder_from_pretrained(path, **options)
    return causal_from_pretrained(path, **options)


def causal_from_pretrained(path: str | os.PathLike[str], **options: Any) -> GPT | LSTMLM:
    """Load a model that predicts the next token: a GPT or an LSTM."""
    if read_config(Path(path)).get("model_type") == LSTM_TYPE:
        dtype = options.pop("dtype", "auto")
        if dtype not in ("auto", torch.float32):
            raise ValueError(f"an LSTM's weights are float32, got dtype={dtype}")
        return LSTMLM.from_pretrained(path, **options)
    return from_pretrained(path, **options)


class _Checkpoint:
    """The tensors of a folder, by their bare names, over all its files."""

    def __init__(self, folder: Path, stack: ExitStack, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.tensors: dict[str, tuple[Any, str]] = {}  # bare name -> (open file, full name)
        for file in _files(folder):
            try:
                opened = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                size = file.stat().st_size
                raise ValueError(f"{file} is not a whole safetensors file ({size:,} bytes): {error}") from None
            for name in opened.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
                self.tensors[bare(name, kind)] = (opened, name)
        rename_old(self.tensors)

    def fill(self, model: Model, dtype: torch.dtype | str, device: torch.device | str) -> Model:
        """The model, made on the meta device, with the weights of the folder."""
        plan = self.check(model)
        model = allocate(model.to(self.dtype() if dtype == "auto" else dtype), device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                self.read(plan[name], parameter)
        if (self.folder / ADAPTER).is_dir():
            from fastlm.models.lora import load_lora  # it reads names of this package

            load_lora(model, self.folder / ADAPTER)
        return model.eval()

    def check(self, model: GPT | Encoder) -> dict[str, Source]:
        """What each parameter is read from. All is checked (names, shapes, dtypes) before anything is read."""
        config = model.config
        plan = sources(config, self.kind, {name: tuple(p.shape) for name, p in model.named_parameters()})
        wanted: dict[str, tuple[int, ...]] = {}
        for source in plan.values():
            wanted.update(zip(source.names, source.stored_shapes, strict=True))
        held = {name for name in self.tensors if not is_ignored(name, config)}
        missing, extra = wanted.keys() - held, held - wanted.keys()
        if missing or extra:
            raise ValueError(f"{self.folder} does not hold the tensors of its config.json:{_listed(missing, extra)}")
        for name, shape in wanted.items():
            opened, full_name = self.tensors[name]
            stored = opened.get_slice(full_name)
            if tuple(stored.get_shape()) != shape:
                raise ValueError(
                    f"{self.folder}: {full_name} has shape {tuple(stored.get_shape())}; config.json asks for {shape}"
                )
            if stored.get_dtype() not in _DTYPES:
                raise ValueError(
                    f"{self.folder}: {full_name} is stored as {stored.get_dtype()}; fastlm loads {', '.join(_DTYPES)}"
                )
        return plan

    def dtype(self) -> torch.dtype:
        """The widest dtype among the tensors."""
        stored = {opened.get_slice(name).get_dtype() for opened, name in self.tensors.values()}
        return next(dtype for name, dtype in _DTYPES.items() if name in stored)

    def read(self, source: Source, parameter: torch.Tensor) -> None:
        """Copy the tensors that a parameter is made of into it."""
        for name, part in zip(source.names, parameter.split(source.rows), strict=True):
            opened, full_name = self.tensors[name]
            stored = opened.get_tensor(full_name)
            part.copy_(stored.T if source.transposed else stored)


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}: give a folder with config.json and safetensors. {HOW_TO_DOWNLOAD}")
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; it holds: {_names(folder)}{_model_in(folder)}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(fields).__name__}")
    return fields


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; all of them are there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise ValueError(
                f"{folder} has its weights in pickle files only ({', '.join(pickles[:3])}); to read one is to run the "
                "code in it, so fastlm does not. Convert them where you trust them: "
                "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}; it holds: {_names(folder)}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder} is incomplete: {len(missing)} of the {len(names)} files that {INDEX} names are missing: "
            f"{', '.join(missing)}"
        )
    return [folder / name for name in names]


def _model_in(folder: Path) -> str:
    """Where the model is, if the folder is a run or a checkpoint."""
    from fastlm.training.loading import find_model  # here: the training package imports this one

    try:
        return f"; give the folder of a model, here {find_model(folder)[0]}"
    except (OSError, ValueError):
        return ""


def _names(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return (", ".join(names[:10]) + (" ..." if len(names) > 10 else "")) or "nothing"


def _listed(missing: Iterable[str], extra: Iterable[str], most: int = 10) -> str:
    """Missing and extra names, each missing one with the nearest of the extra ones."""
    missing, extra = sorted(missing), sorted(extra)
    lines = []
    for title, names in (("missing", missing), ("unknown", extra)):
        if names:
            lines.append(f"\n  {len(names)} {title}:")
        for name in names[:most]:
            near = difflib.get_close_matches(name, extra, n=1, cutoff=0.8) if title == "missing" else []
            lines.append(f"\n    {name}" + (f" (there is {near[0]})" if near else ""))
        if len(names) > most:
            lines.append(f"\n    and {len(names) - most} more")
    return "".join(lines)
