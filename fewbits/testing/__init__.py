"""Contract suites, slow twins, tiny models and outside oracles, shipped with the package.

``contracts`` holds the promises of grids, surrogates and scale rules, ``oracles`` the slow twins, ``tiny`` small seeded
models and a toy corpus, ``ggml`` llama.cpp's own functions.
"""
