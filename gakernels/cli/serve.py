"""`gakernels serve`: an OpenAI-style server whose models are users' contexts."""

import argparse
import asyncio
import ipaddress
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from gakernels.cli.common import add_command, add_model_options, load_generator, read_text
from gakernels.demo import TINY_GENERATOR
from gakernels.errors import InputError, check_least
from gakernels.paths import user_path
from gakernels.server.settings import ApiKeys, Limits, Settings

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")
# A chat template for the models of the package, which know only questions and answers.
DEMO_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %} Question: {{ message.content }} Answer:"
    "{% else %} {{ message.content }}{% endif %}{% endfor %}"
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "serve",
        run,
        "Serve contexts of many users: create one, append texts to it, and use it as the model of OpenAI-style "
        "completions. Without --generator it uses the small model that is part of the package.",
        "  gakernels serve --folder server-data --port 8100\n"
        "  curl 127.0.0.1:8100/v1/contexts -H 'Content-Type: application/json' -d '{\"text\": \"...\"}'",
    )
    add_model_options(parser, generator_required=False)
    parser.add_argument("--folder", type=user_path, required=True, help="folder for the contexts; created if missing")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8100, help="port, or 0 for any free one (default: %(default)s)")
    parser.add_argument("--name", help="name of the base model in requests (default: from its folder)")
    parser.add_argument(
        "--api-keys", type=user_path, help="file with one API key per line; each key sees only its own contexts"
    )
    parser.add_argument(
        "--chat-template",
        type=user_path,
        help="Jinja template (default: the one that the generator was tuned with, or the tokenizer's)",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin (https://example.org) use the server from a browser; can be repeated; * for "
        "all (default: none)",
    )
    parser.add_argument(
        "--threads", type=int, help="threads for CPU operations (default: 1 with the package's own model)"
    )
    _add_limits(parser)
    _add_vllm(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    defaults = Limits()
    for name, what in (
        ("contexts", "contexts in all"),
        ("contexts_per_key", "contexts per API key"),
        ("append_tokens", "tokens per append"),
        ("context_tokens", "tokens per context"),
        ("prompts", "prompts per request"),
        ("new_tokens", "tokens generated per prompt"),
        ("rows", "prompts decoded together"),
        ("cache_tokens", "tokens of the key-value cache: rows times the longest"),
        ("waiting", "prompts and appends that wait or run"),
        ("body_bytes", "bytes per request"),
    ):
        option, summary = f"--max-{name.replace('_', '-')}", f"{what} (default: %(default)s)"
        group.add_argument(option, type=int, default=getattr(defaults, name), help=summary)
    for tier, default in (("gpu", 4096), ("cpu", 1024), ("disk", 4096)):
        text = f"MiB of cached adapters, {tier} (default: %(default)s)"
        group.add_argument(f"--cache-{tier}", type=int, default=default, help=text)


def _add_vllm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding by a vLLM server")
    group.add_argument("--engine", choices=("local", "vllm"), default="local", help="default: %(default)s")
    group.add_argument("--url", help="URL of the vLLM server, such as http://127.0.0.1:8000")
    group.add_argument("--vllm-key", type=user_path, help="file with the API key of the vLLM server")
    group.add_argument(
        "--vllm-adapters", type=int, default=64, help="most adapters registered there (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    try:
        from gakernels.server.server import serve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'gakernels[serve]'") from error
    _check(options)
    embedded = options.generator is None
    if embedded:
        options.generator = TINY_GENERATOR
    template = None if options.chat_template is None else read_text(options.chat_template, "--chat-template")
    limits = _limits(options)
    keys = ApiKeys() if options.api_keys is None else ApiKeys.read(options.api_keys)
    model = load_generator(options).eval()
    settings = Settings(
        folder=options.folder,
        base_name=options.name or _base_name(model.base.config.name_or_path, embedded),
        limits=limits,
        keys=keys,
        gpu_mebibytes=options.cache_gpu,
        cpu_mebibytes=options.cache_cpu,
        disk_mebibytes=options.cache_disk,
        threads=1 if embedded and options.threads is None else options.threads,
        chat_template=DEMO_CHAT_TEMPLATE if embedded and template is None else template,
        cors_origins=tuple(options.cors_origin),
        vllm_url=options.url,
        vllm_key=None if options.vllm_key is None else read_text(options.vllm_key, "--vllm-key").strip(),
        vllm_adapters=options.vllm_adapters,
    )
    asyncio.run(serve(model, settings, options.host, options.port, lambda url: print(f"serving on {url}", flush=True)))
    return 0


def _check(options: argparse.Namespace) -> None:
    if (options.engine == "vllm") != (options.url is not None):
        raise InputError("--engine vllm and --url belong together")
    check_least(0, **{f"--cache-{tier}": getattr(options, f"cache_{tier}") for tier in ("gpu", "cpu", "disk")})
    check_least(1, **{"--vllm-adapters": options.vllm_adapters, "--threads": options.threads})
    for origin in options.cors_origin:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise InputError(
                f"--cors-origin must be * or an origin as browsers send it, such as https://example.org or "
                f"http://localhost:3000, without a path and in lower case, but it is {origin!r}"
            )
    if options.api_keys is None and not _is_loopback(options.host):
        raise InputError(f"--host {options.host} lets other machines connect; give --api-keys as well")


def _limits(options: argparse.Namespace) -> Limits:
    """Each limit has an option of its name, prefixed with `max`."""
    return Limits(**{field.name: getattr(options, f"max_{field.name}") for field in fields(Limits)})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _base_name(path: str, embedded: bool) -> str:
    return "gakernels-demo" if embedded else Path(path).name or "base"
