"""The world: drawn scenes, their captions, a text-conditioned transformer, subjects and styles."""
