"""Write a trained model as a folder that plain transformers (and so vLLM and the llama.cpp converters) loads.

stepkd export runs/sft --to models/sft
stepkd export runs/sft --to models/sft-adapter --mode adapter
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``stepkd export``."""
    parser.add_argument("source", help="run folder (its best checkpoint), .ckpt file, adapter folder, .gguf or model")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="folder to write; whole or not at all")
    parser.add_argument(
        "--mode", choices=("merged", "adapter"), default="merged", help="fold the adapter in, or write it alone"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as trained")
    parser.add_argument("--no-ema", action="store_true", help="the trained weights, even if averaged ones exist")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the folder to this repository afterwards")


def run(arguments: argparse.Namespace) -> int:
    """Run ``stepkd export``."""
    from stepkd.models.checkpoint import export_model
    from stepkd.runs.process import quiet_libraries

    quiet_libraries()
    folder = export_model(
        arguments.source,
        arguments.to,
        mode=arguments.mode,
        dtype=arguments.dtype,
        ema=not arguments.no_ema,
        overwrite=arguments.overwrite,
        push_to_hub=arguments.push_to_hub,
    )
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"wrote {folder} ({size / 2**20:.1f} MiB)")
    return 0
