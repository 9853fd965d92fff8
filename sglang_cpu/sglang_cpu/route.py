"""`python -m sglang_cpu.route FLAGS`: sglang-router, which imports SGLang; the flags are the router's own."""

import sys

import sglang_cpu  # noqa: F401  (before any import of SGLang)

if __name__ == "__main__":
    from sglang_router.launch_router import launch_router, parse_router_args

    launch_router(parse_router_args(sys.argv[1:]))
