"""How diffusers' official train_text_to_image.py behaves under faults.

    DIFFUSERS_SOURCE=<checkout of diffusers> python -m benchmarks.official_faults
        [--only R2 R16 ...] [--json PATH]

Each row has the number of the test that asks the same of this library's script (in
``tests/reliability`` and ``tests/scripts``) and says what the official script did: measured, on a
tiny Stable Diffusion pipeline, on the CPU, without network.
"""
