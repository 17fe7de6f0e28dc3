"""What lets a training run survive being killed: exact resuming, checkpoints complete or absent, wandb out of reach.

``resumable_store`` feeds the trainer and knows its position; ``checkpointer`` writes what a run needs to go on, in a
``run_folder`` that belongs to one process at a time, with a ``manifest`` by which ``checkpoints`` tells whole from
damaged; ``wandb_run`` goes on without what wandb does not take. ``training_on`` starts a run from an SAE that is there;
``start_checks`` and ``option_checks`` refuse what a run could not use.

``caching`` writes a run's activations to disk, and ``cached_activations`` has the same trainers read them from there.
"""
