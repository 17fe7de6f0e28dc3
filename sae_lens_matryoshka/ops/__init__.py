"""The mathematics of a training step: for each operation a readable reference and a fast version that agree.

The fast versions make nothing of size batch x d_sae, except for JumpReLU and ReLU while a large share of all latents
fires. The data's way through a step:

    sae_in -> selection.py  finds the latents that can matter, column chunk by column chunk
           -> latents.py    lays them out by level and sample, and by latent; or the whole matrix by level
           -> encoder.py    their pre-activations, with a gradient from the non-zeros only
           -> nested_loss.py    every level's squared error by running sums, its gradient by suffix sums
           -> auxiliary_loss.py the same for dead latents, on the dead columns only
"""
