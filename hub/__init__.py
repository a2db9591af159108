"""WHERE models go: cards, push, pull, the folder hub, and a hub server of one's own."""
