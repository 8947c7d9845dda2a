"""Word lists that every name and value of the world is put together from.

The words are common ones, so that nearly each of them is a single token for SmolLM2, inside brackets (`lookup[Stone
Falls]`) as well as after a space. The combinations are made up.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE_NAMES = _words(
    """
    Alice Anna Mary Jane Sarah Emily Rose Maria Elizabeth Jean Kim Marie Emma Clara Helen Laura Lucy Grace Julia Susan
    Diana Margaret Victoria Charlotte
    """
)
MALE_NAMES = _words(
    """
    Tom Peter Paul Mark Luke John James David Daniel Adam Simon Martin Henry George Edward Frank Fred Jack Sam Ben Max
    Robert Richard William Charles Thomas Joseph Michael Andrew Carl Arthur Samuel Alexander Matthew Victor Louis Jeff
    Chris
    """
)
SURNAMES = _words(
    """
    Stone Wood Hill Lake Field Snow Winter Summer Spring Cook Miller Smith Taylor Young King Prince Church Bell Cross
    Bird Marsh Forest Park Pool Hall House Page Price Rich Short Strong Love Hope Day Best Black Brown White Green
    Silver Gold West North East South Grant Newton Lincoln Washington Jackson Johnson Wilson Clark Lewis Scott Baker
    Carter Fisher Hunter Mason Potter Turner Walker Wright Knight Bishop Fox Wolf Moore Banks Cooper Parker
    """
)

# First words of towns, companies, schools, regions and rivers.
PLACE_WORDS = _words(
    """
    Ash Iron Silver Golden Rain Cloud Star Moon Sun Red Blue Green White Black Clear Deep High Long Broad North South
    East West Upper Lower New Old Royal Mill Market Honey Salt Sugar Apple Cold Dry Wild Stone Ocean Delta Omega Alpha
    Vector Matrix Cedar Maple Oak Pine Willow Copper Crystal Shadow Thunder Storm Bright Lost Hidden Quiet Silent
    Eagle Falcon Bear Deer Wolf Raven Lion Tiger Dragon Phoenix Castle Crown Chapel Cherry Orange Lemon Frozen Warm
    Granite Marble Coral Pearl Ruby Autumn Harvest Mirror Garden Island Beacon Mercury Saturn Jupiter Apollo Atlas
    Titan Liberty Victory Summit Pioneer Frontier Heritage Horizon
    """
)
TOWN_SUFFIXES = _words(
    """
    Falls Hollow Creek Ridge Valley Point Bay Beach Hill Heights Springs Grove Woods Bridge Harbor Haven Port Gate
    Landing Rock Rapids Lake Crossing Corner Shore Cliff
    """
)
COMPANY_SUFFIXES = _words(
    """
    Foods Motors Mills Works Steel Glass Paper Press Books Records Media Games Tools Clothing Energy Power Water Gas
    Mining Metals Systems Software Networks Labs Trading Transport Airlines Shipping Machines Electronics Chemicals
    Farms Coffee Pictures Films Fashion Bank Insurance Radio
    """
)
SCHOOL_SUFFIXES = _words("College School Academy Institute University")
REGION_SUFFIXES = _words("Province County District Plains Coast Islands")

PRODUCTS = _words(
    """
    clocks chairs boats bread cheese candles carpets bicycles cameras guitars bottles windows tractors trucks shoes
    hats gloves coats lamps mirrors knives pens soap paint tiles bricks ropes sails engines pumps batteries toys
    puzzles
    """
)
INSTRUMENTS = _words("violin flute drums harp piano guitar trumpet organ")
WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
FLOWERS = _words("rose lily violet iris poppy lotus orchid sunflower")
COLOURS = _words("red blue green yellow purple orange white black silver gold")
