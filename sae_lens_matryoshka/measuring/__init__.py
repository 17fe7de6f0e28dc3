"""Figures of an SAE: the threshold at which it fires k latents, how well each level does, features found."""
