"""Contract suites, slow twins and outside oracles, shipped with the package."""
