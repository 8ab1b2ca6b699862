"""``python -m diffusers_curriculum.cli`` is the `diffusers-curriculum` command."""

from diffusers_curriculum.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
