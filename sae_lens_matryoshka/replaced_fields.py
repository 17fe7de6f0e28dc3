"""Fields of earlier versions, which have another name now."""

REPLACED_FIELDS = {
    "order_latents_by_contribution": "order_latents_by (contribution)",
    "latent_contribution_lr": "latent_order_lr",
}
"""Old name -> the new one, with the value that says the same where it is another."""
