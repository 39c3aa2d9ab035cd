"""Previews: latents to pictures, with nothing but the VAE's decoder in memory.

stage.py  the stage
sheet.py  the contact sheet
"""
