"""Contract suites, slow twins and tiny models, shipped with the package.

``contracts`` holds the promises of grids, surrogates and scale rules, ``oracles`` the slow twins, ``tiny`` small seeded
models and a toy corpus.
"""
