"""The relations of the world: which facts an entity of each kind has, and how they are worded."""

from dataclasses import dataclass

KINDS = ("person", "company", "town", "school", "region")


@dataclass(frozen=True)
class Relation:
    """One kind of fact. `target` is a kind of entity, or the name of a list of plain values."""

    subject: str
    noun: str
    target: str
    sentence: str

    @property
    def leads_to_entity(self) -> bool:
        """True if the value has its own entry, so that a question can continue from it."""
        return self.target in KINDS


RELATIONS = (
    Relation("person", "employer", "company", "{their} employer is {value}."),
    Relation("person", "home town", "town", "{their} home town is {value}."),
    Relation("person", "birth town", "town", "{their} birth town is {value}."),
    Relation("person", "spouse", "person", "{their} spouse is {value}."),
    Relation("person", "teacher", "person", "{their} teacher is {value}."),
    Relation("person", "school", "school", "{their} school is {value}."),
    Relation("person", "instrument", "instrument", "{their} instrument is the {value}."),
    Relation("person", "birth year", "year", "{their} birth year is {value}."),
    Relation("company", "founder", "person", "Its founder is {value}."),
    Relation("company", "director", "person", "Its director is {value}."),
    Relation("company", "headquarters", "town", "Its headquarters are in {value}."),
    Relation("company", "rival", "company", "Its rival is {value}."),
    Relation("company", "product", "product", "Its product is {value}."),
    Relation("company", "founding year", "year", "Its founding year is {value}."),
    Relation("town", "region", "region", "Its region is {value}."),
    Relation("town", "mayor", "person", "Its mayor is {value}."),
    Relation("town", "river", "river", "Its river is the {value}."),
    Relation("town", "twin town", "town", "Its twin town is {value}."),
    Relation("town", "market day", "weekday", "Its market day is {value}."),
    Relation("school", "head", "person", "Its head is {value}."),
    Relation("school", "sponsor", "company", "Its sponsor is {value}."),
    Relation("school", "location", "town", "Its location is {value}."),
    Relation("school", "colour", "colour", "Its colour is {value}."),
    Relation("school", "opening year", "year", "Its opening year is {value}."),
    Relation("region", "capital", "town", "Its capital is {value}."),
    Relation("region", "governor", "person", "Its governor is {value}."),
    Relation("region", "flower", "flower", "Its flower is the {value}."),
    Relation("region", "largest company", "company", "Its largest company is {value}."),
)

BY_NOUN = {relation.noun: relation for relation in RELATIONS}
BY_SUBJECT = {kind: tuple(r for r in RELATIONS if r.subject == kind) for kind in KINDS}

# Sentences that say nothing a question asks for; an entry carries a few of them.
FILLER = {
    "person": (
        "{they} keeps bees and reads old maps.",
        "{they} walks to work when the weather is good.",
        "A short film about the family was shown last year.",
        "{they} once won a prize for a very large pumpkin.",
        "Friends say that {they_lower} never forgets a birthday.",
        "{they} has a small dog that likes to sleep under the table.",
        "The house has a blue door and a garden full of herbs.",
        "{they} collects stamps and writes long letters by hand.",
    ),
    "company": (
        "It has about two hundred workers and a small canteen.",
        "A fire destroyed the first building, which was soon rebuilt.",
        "Visitors can see the old machines on the ground floor.",
        "The company sponsors a chess club and a summer fair.",
        "Its yearly report is printed on recycled paper.",
        "The sign above the gate has not been changed for decades.",
        "A long strike ended with higher wages for all.",
        "New workers get a tour and a warm meal on the first day.",
    ),
    "town": (
        "The old bridge was repaired after the great storm.",
        "Tourists like the small museum behind the station.",
        "A stone tower stands on the hill above the houses.",
        "In summer there is a festival with music and lights.",
        "The library is open until late in the evening.",
        "A narrow path leads from the square to the water.",
        "Most houses have red roofs and wooden balconies.",
        "The bakery near the fountain is known for its pies.",
    ),
    "school": (
        "The main building has a glass roof and a green door.",
        "Every pupil learns to swim in the first year.",
        "The choir sings in the garden each spring.",
        "Its library holds a rare collection of letters.",
        "A new sports hall was added some years ago.",
        "Lessons begin early and end with an hour of reading.",
        "The kitchen grows its own vegetables behind the hall.",
        "Old pupils meet there every autumn for a long dinner.",
    ),
    "region": (
        "Wide fields and low hills cover most of it.",
        "The coast road is known for its strong winds.",
        "Most people there work on farms or in small shops.",
        "Winters are mild and the summers are rather dry.",
        "An old railway still crosses it from end to end.",
        "Storks nest on many of the roofs in early spring.",
        "Its people are known for their songs and their soups.",
        "A long wall of grey stones marks the northern border.",
    ),
}
FILLER_PER_ENTRY = 8
