"""Where the platform touches the outside: artefact store, ledger, registry, compute, environment."""
