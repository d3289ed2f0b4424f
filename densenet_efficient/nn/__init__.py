"""The modules: dense block, transition, feature extractor, and the architecture they form. May
import `core` and `ops`."""
