"""`upslope export`: a model for use elsewhere, as a Hugging Face folder with its card or as a GGUF file.

A whole model's weights are written as they are stored, cast; adapters are merged in float32 first. With --verify the
program that the format is for loads the result before it gets its name: what fails is not published.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy, load_inference
from upslope.commands.export_card import Origin, origin_of, write_card
from upslope.commands.export_verify import Gap, is_classifier, verify_folder, verify_gguf
from upslope.data.chat import load_tokenizer, token_count, write_ends
from upslope.errors import ModelError, RunError
from upslope.extras import require
from upslope.models.decoder.network import Decoder
from upslope.models.files.config_json import architecture
from upslope.models.files.folders import is_adapter, new_file, new_folder, provenance, read_config
from upslope.models.files.gguf_writer import write_gguf
from upslope.models.files.loading import decoder_config, save_model
from upslope.models.files.sources import resolve
from upslope.models.files.weights import load, save_folder
from upslope.options import ExportOptions

_ENCODER_HEADS = {"ForSequenceClassification": "classify", "ForTokenClassification": "tag", "ForMaskedLM": "masked"}


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: `found` is a model folder or adapters; `policy` is its network, None for an encoder."""

    found: Path
    folder: Path
    policy: Policy | None


def run(options: ExportOptions) -> int:
    """Write, compare, report. RunError where the comparison fails; then nothing was written."""
    assert options.output is not None
    output = Path(options.output).expanduser()
    _refuse_existing(output, options.overwrite)
    if options.verify and options.format == "gguf":
        require("verify", "xllamacpp")  # before the work, not after it
    source = load_source(options.model, options.base)
    if source.found.resolve().is_relative_to(output.resolve()):
        raise RunError(f"{output} holds what is to be exported; choose another --output")
    origin = origin_of(source.found, source.folder, base=options.base, license=options.license)
    write = _write_file if options.format == "gguf" else _write_folder
    _report(output, options, write(source, output, options, origin))
    return 0


def load_source(model: str, base: str | None) -> Source:
    """Resolve and load; every tensor is then known to be there and to fit. ModelError says what is wrong."""
    found = resolve(model, adapters=True)
    if not is_adapter(found):
        _refuse_unusable(found)
    kind = None if is_adapter(found) else _encoder_kind(read_config(found))
    if kind is not None:
        from upslope.models.encoder.network import load_encoder

        load_encoder(found, kind).check_tokens(token_count(load_tokenizer(found)), found)
        return Source(found, found, None)
    policy = load_inference(found, dtype="float32", base=base, trunk=True)
    policy.model.keep_tokens(len(policy.model.output_weight), found)  # other programs compute all rows
    return Source(found, policy.folder, policy)


def _encoder_kind(config: dict[str, Any]) -> Any:
    """classify, tag or masked for an encoder's folder; a decoder with a score is no encoder."""
    from transformers.models.auto import modeling_auto

    if config.get("model_type") not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return None
    return next((kind for ending, kind in _ENCODER_HEADS.items() if architecture(config).endswith(ending)), "masked")


def _refuse_unusable(folder: Path) -> None:
    """Quantised weights and odd types cannot be cast; `load` refuses what is no number."""
    if read_config(folder).get("quantization_config"):
        raise ModelError(f"{folder}: holds quantised weights; export the unquantised model")
    usable = {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool}
    for name, tensor in load(folder).items():
        if tensor.dtype not in usable:
            raise ModelError(f"{folder}: {name} is {str(tensor.dtype).removeprefix('torch.')}, which is not cast here")


def _refuse_existing(output: Path, overwrite: bool) -> None:
    """Before any work; the writers check again. A model folder may be replaced, never a folder of other things."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise RunError(f"{output} already exists; choose another --output, or replace it with --overwrite")
    if output.is_dir() and not (output / "config.json").is_file():
        raise RunError(f"{output} is a folder without config.json, so no model is replaced; choose another --output")


def _write_folder(source: Source, output: Path, options: ExportOptions, origin: Origin) -> list[Gap]:
    dtype, policy = getattr(torch, options.dtype), source.policy
    sizes: dict[str, Any] = {"dtype": dtype, "max_shard_bytes": options.max_shard_gb * 1e9, "overwrite": True}
    known = {k: v for k, v in provenance(source.folder).items() if k not in ("kind", "origin")}  # no paths of ours
    record = {"kind": "export", "origin": origin.base_model, **known}
    with new_folder(output, overwrite=options.overwrite, record=record) as temp:
        adapted = policy is not None and is_adapter(source.found)
        tensors = dict(policy.model.named_parameters()) if adapted else load(source.folder)
        _check_range(tensors, dtype)
        if adapted:
            tokenizer = policy.tokenizer if (source.found / "tokenizer.json").is_file() else None
            save_model(policy.model, temp, tensors=tensors, source_folder=source.folder, tokenizer=tokenizer, **sizes)
        else:
            save_folder(temp, read_config(source.folder), tensors, source_folder=source.folder, **sizes)
        if policy is not None and not is_classifier(read_config(source.folder)):
            write_ends(temp, policy.eos_token_ids)
        gaps = verify_folder(temp, source.folder, policy, options.dtype) if options.verify else []
        write_card(origin, temp, name=options.name or output.name, dtype=options.dtype, gaps=gaps)
    return gaps


def _check_range(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        largest = float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0
        if not largest <= limit:
            word = str(dtype).removeprefix("torch.")
            raise ModelError(f"{name} holds {largest:g}, but {word} ends at {limit:g}; export as bfloat16 or float32")


def _write_file(source: Source, output: Path, options: ExportOptions, origin: Origin) -> list[Gap]:
    policy, config = source.policy, read_config(source.folder)
    kind = architecture(config) or config.get("model_type")
    causal = policy is not None and isinstance(policy.model, Decoder) and not is_classifier(config)
    if policy is None or not causal or decoder_config(source.folder) is None:
        raise ModelError(
            f"{source.found}: {kind} cannot be written as GGUF; language models of the llama, mistral, qwen2 "
            "and qwen3 families can, without sliding windows and other variants (use --format hf)"
        )
    about = {"name": options.name or output.stem, "license": origin.license, "description": origin.summary}
    with new_file(output, overwrite=options.overwrite) as temp:
        write_gguf(
            temp,
            policy.model.config,
            dict(policy.model.named_parameters()),
            policy.tokenizer,
            kind=options.dtype,
            eos_token_ids=policy.eos_token_ids,
            split=options.pre_tokenizer,
            about={key: text for key, text in about.items() if text},
        )
        return verify_gguf(temp, policy, options.dtype) if options.verify else []


def _report(output: Path, options: ExportOptions, gaps: list[Gap]) -> None:
    files = sorted(p for p in output.rglob("*") if p.is_file()) if output.is_dir() else [output]
    size = sum(path.stat().st_size for path in files)
    if options.json:
        found = list(map(asdict, gaps))
        print(json.dumps({"output": str(output), "dtype": options.dtype, "bytes": size, "verified": found}))
        return
    print(output)
    print(f"  {options.dtype}, {size / 1e6:.1f} MB in {len(files)} file{'s' * (len(files) > 1)}")
    for gap in gaps:
        print(f"  {gap.in_words()}")
    if not options.verify:
        print("  not compared with anything; --verify loads it with the program it is for", file=sys.stderr)
