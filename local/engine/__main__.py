"""`python -m local.engine`: serves one engine until it is killed."""

import argparse
import asyncio
import logging
import signal
import threading
from pathlib import Path

from aiohttp import web

from local.engine.engine import Engine, EngineOptions
from local.engine.executor import ExecutorOptions
from local.engine.flux_loaders import warm_up
from local.engine.server import create_app


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m local.engine", description="ComfyUI's wire in front of a small model that needs no GPU."
    )
    parser.add_argument("--port", type=int, default=8188, help="0 takes a free one")
    parser.add_argument("--listen", default="127.0.0.1", help="address to bind")
    parser.add_argument("--base-directory", type=Path, required=True, help="holds models/, input/, output/ and temp/")
    parser.add_argument("--models", type=Path, action="append", default=[], help="a further models folder, searched too; repeatable")
    parser.add_argument("--nodes", action="append", default=[], metavar="MODULE", help="module with further NODES; repeatable")
    parser.add_argument("--preview-method", choices=["none", "auto"], default="none")
    parser.add_argument("--warm-up", action="store_true", help="import torch at start, beside serving: the first prompt is seconds quicker")
    parser.add_argument("--disable-metadata", action="store_true", help="keep the graph out of the PNG files")
    caching = parser.add_mutually_exclusive_group()
    caching.add_argument("--cache-lru", type=int, default=0, metavar="N", help="keep N node results instead of the previous prompt's")
    caching.add_argument("--cache-none", action="store_true", help="run every node every time")
    return parser.parse_args()


def read_options(arguments: argparse.Namespace) -> EngineOptions:
    return EngineOptions(
        base_directory=arguments.base_directory,
        model_directories=arguments.models,
        node_modules=arguments.nodes,
        cache_mode="none" if arguments.cache_none else "lru" if arguments.cache_lru > 0 else "classic",
        cache_size=arguments.cache_lru,
        execution=ExecutorOptions(
            previews_enabled=arguments.preview_method != "none",
            metadata_enabled=not arguments.disable_metadata,
        ),
    )


async def serve(arguments: argparse.Namespace) -> None:
    engine = Engine(read_options(arguments))
    engine.start()
    runner = web.AppRunner(create_app(engine), access_log=None, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, arguments.listen, arguments.port)
    try:
        await site.start()
    except OSError as error:
        raise SystemExit(f"cannot listen on {arguments.listen}:{arguments.port}: {error.strerror}") from error
    if arguments.warm_up:
        threading.Thread(target=warm_up, name="warm-up", daemon=True).start()
    port = runner.addresses[0][1]
    print(f"listening on http://{arguments.listen}:{port}", flush=True)
    await engine.sockets.publish()


def main() -> None:
    # Like ComfyUI: no drain and no farewell, whatever runs is lost.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(serve(parse_arguments()))


if __name__ == "__main__":
    main()
