"""Plain words for keys and for the neutral haystack: no digits, nothing that the probes ask about."""

_ADJECTIVES = """
amber ancient autumn broad bright brisk calm careful clever cold common copper crisp curious damp dark deep distant
dusty eager early empty even faded faint familiar fine firm foggy formal frozen gentle golden grand green grey
hollow humble idle inner iron kind late level light little lively lone long low mellow mild modest narrow neat noble
northern old open pale patient plain polite proper proud quick quiet rapid rare rough round rural rustic scarlet
serious shallow shy silent silver simple slender slow small smooth sober soft solid southern steady steep still
stony sunny tall tame thin tidy upper useful vast violet warm weary western white wide wild wise wooden young
"""
_NOUNS = """
acorn anchor apple apron arch badge baker balcony banner barley barn basin basket beacon bell bench berry bicycle
boat bottle boulder branch brick bridge brook broom bucket button cabin camel candle canoe canyon carpet cart castle
cedar cello chair chapel cherry cliff clock cloud coat compass cottage crane cricket crow curtain daisy desk donkey
door dove drum eagle engine falcon farmer feather fence ferry fiddle field fig flute forest fountain fox garden gate
glove goose grove hammer harbour harp hat hawk heron hill horse hut island ivy jacket jar juniper kettle kite ladder
lake lamp lantern lark lemon lily lizard loom maple market meadow melon mill miller mirror moss mountain needle oak
oar olive orchard otter oven owl paddle painter panther parrot path pebble pencil piano pigeon pillow pine pitcher
plum pond poplar porch potter quarry quilt rabbit raft raven reed ribbon river robin rope rose saddle sailor scarf
shed shelf shepherd ship shore shovel sparrow spoon spruce stable statue stove stream swan table tailor teapot
temple thistle tiger tower trail trumpet tulip tunnel valley vase village vine violin wagon wall walnut weaver well
whistle willow window wolf wren yard
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
VERBS = (
    "stood beside",
    "lay behind",
    "was painted near",
    "belonged to",
    "faced",
    "was older than",
    "was seen from",
    "rested against",
    "came before",
    "was left beside",
    "was built by",
    "looked like",
    "was kept near",
    "could be heard from",
    "was carried past",
    "waited for",
)
# The empty ones make half of the sentences plain.
OPENINGS = (
    *("", "", "", "", "", "", "", ""),
    "In the morning ",
    "By the evening ",
    "For a while ",
    "Every summer ",
    "In those days ",
    "After the rain ",
    "Before the winter ",
    "On most days ",
)
ENDINGS = (
    *("", "", "", "", "", "", "", ""),
    " at the edge of the town",
    " near the old road",
    " on the other side of the hill",
    " by the water",
    " in the next valley",
    " for the rest of the season",
    " without much notice",
    " until the light was gone",
)
