"""Wan 2.2, of text: 5B."""

from families.wan import Wan


class Wan22(Wan):
    """Another VAE, with half the latents along a side, for larger videos and more frames.

    Its pipeline is Wan 2.1's, and shows the network a time for each token: an image to begin with
    would have none. Of text alone they are all the same, as in Wan.call.
    """

    fps = 24
    # What it was published with; its pipeline's call has the size of Wan 2.1.
    call_size = {"height": 704, "width": 1280, "num_frames": 121}
