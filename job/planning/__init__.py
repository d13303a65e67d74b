"""`plan`: checks a run and forecasts its memory, time and cost, before a GPU is paid for.

| question | file |
|---|---|
| what is checked: storage, model, tokenizer, data, questions, disk | `preflight`, and `plan` for the order |
| a run as the forecast takes it, and how it is worked out | `forecast_input`, `run_shape` |
| whether a run fits on a GPU, and what it costs there | `forecast` |
| memory and micro-batches on a GPU; hours | `forecast_memory`; `forecast_time` |
| formulas of memory; of operations and seconds | `training/memory_model`; `time_model` |
| what is said of a GPU besides its figures | `forecast_notes` |
| optimizer steps and tokens | `workload` (the schedule of the learning rate follows from `total_steps` there) |
| the GPUs, their speed and their prices | `gpu_prices` |
| sizes of public models, data sets and tasks, for a machine without the hub | `known_models_and_data` |
| licences of data sets | `data/licences` |
| what is printed | `plan_text` |
"""
