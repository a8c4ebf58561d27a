"""A decode's record on its way from the host to the GPU: int32 words, one record a token."""

RECORD_WORDS = 8
# the token; the lane whose last token it is instead, or -1; where it stands; blocks of its sequence; where its key and
# value go; its own lane; the last of its blocks, where no tables come; RecentStep.rings, where there is a recent window
TOKEN, SOURCE, POSITION, BLOCKS, SLOT, LANE, NEWEST, RING = range(8)
