// Draws people: reads [{head, hair, skin, beard, beardHair, glasses, face, clothing}, ...] from stdin as JSON and writes
// one SVG a line. Run in a folder whose node_modules hold @dicebear/core and @dicebear/open-peeps.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const find = createRequire(process.cwd() + "/");
const load = (name) => import(pathToFileURL(find.resolve(name)).href);
const { createAvatar } = await load("@dicebear/core");
const peeps = await load("@dicebear/open-peeps");

for (const p of JSON.parse(readFileSync(0, "utf8"))) {
  const svg = createAvatar(peeps, {
    seed: "fixed", head: [p.head], headContrastColor: [p.hair || "000000"], skinColor: [p.skin],
    clothingColor: [p.clothing], face: [p.face], maskProbability: 0,
    facialHair: p.beard ? [p.beard] : [], facialHairProbability: p.beard ? 100 : 0,
    accessories: p.glasses ? [p.glasses] : [], accessoriesProbability: p.glasses ? 100 : 0,
  }).toString();
  // Most heads and beards are drawn in black: give those their hair color, too. The face stays black.
  const parts = svg.split(/(?=<g transform=")/);
  const black = /fill="(#000|#000000|black)"/g;
  const colored = parts.map((part) =>
    p.hair && (part.startsWith('<g transform="matrix(') || part.startsWith('<g transform="translate(279 400)'))
      ? part.replace(black, `fill="#${p.hair}"`) : part);
  console.log(colored.join("").replaceAll("\n", " "));
}
