"""A speaker service for many callers at once: joint batches, enrolled speakers, HTTP.

`batcher.MicroBatcher` runs single requests in batches; `store.open_store` keeps enrolled speakers; `service.Service`
answers; `app.create_app` puts HTTP in front of it. `mrl-redimnet serve` starts all of that: docs/serving.md.
"""
