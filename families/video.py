"""What the video families share."""

import torch

from families.base import Family
from runtime.settings import require


class Video(Family):
    """A Family whose latents are (B, F, C, H, W).

    `measure` sets frame_scale and default_frames as well; a new family says fps.
    """

    frame_scale: int  # frames per latent frame, after the first, which is one
    default_frames: int  # of the model's own videos
    fps: int  # frames a second of them
    decoded_together = 1  # latent frames that the VAE takes at a time, after the first

    def latent_shape(self, resolution=None, frames=None):
        frames = frames or self.default_frames
        takes = self.decoded_together * self.frame_scale
        whole = frames > 1 and frames % takes == 1
        require(whole, f"--frames {frames}: {self.name} takes {takes}n + 1 frames")
        return (frames - 1) // self.frame_scale + 1, *super().latent_shape(resolution)

    def views(self, vae, latents, u):
        """Two frames of two neighbouring latent frames, (2 B, 3, H', W').

        Ours: a whole video and its graph would not fit.
        """
        start = int(u[0] * (latents.shape[1] - 1))
        video = self.decode(vae, latents[:, start : start + 2])  # (B, 3, F', H', W')
        chosen = [int(n * video.shape[2]) for n in u[1:]]
        frames = [video[:, :, i] for i in chosen]  # by a list of numbers the host would wait
        return torch.stack(frames, 1).flatten(0, 1)
