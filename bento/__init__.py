"""The prediction service: engine, adapters, routing, request log and HTTP protocol. Never imports dagster."""
