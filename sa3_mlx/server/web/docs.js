// Shows /openapi.json: every address, what it takes and what it answers.

import { $, element } from "./dom.js";

const spec = await (await fetch("/openapi.json")).json();

function resolve(schema) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.split("/").slice(1).reduce((at, name) => at[name], spec);
}

function kind(schema) {
  const found = resolve(schema);
  if (found.anyOf) return found.anyOf.map(kind).filter((name) => name !== "null").join(" or ");
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (found.const !== undefined) return JSON.stringify(found.const);
  if (found.type === "array") return `list of ${kind(found.items)}`;
  return found.title && found.properties ? found.title : (found.type ?? "anything");
}

function fields(schema, depth = 0) {
  const found = resolve(schema);
  const nested = (inner) => {
    const own = resolve(inner);
    if (own.properties) return [own];
    return [...(own.anyOf ?? []), ...(own.items ? [own.items] : [])].flatMap(nested);
  };
  return Object.entries(found.properties ?? {}).flatMap(([name, value]) => {
    const needed = found.required?.includes(name) ? ", needed" : "";
    const usual = value.default === undefined || value.default === null ? "" : `, usually ${JSON.stringify(value.default)}`;
    const row = [
      element("dt", {}, `${"    ".repeat(depth)}${name}`),
      element("dd", {}, `${kind(value)}${needed}${usual}. ${value.description ?? ""}`),
    ];
    return [...row, ...(depth < 3 ? nested(value).flatMap((inner) => fields(inner, depth + 1)) : [])];
  });
}

function operation(path, method, found) {
  const parts = [element("summary", {}, element("code", {}, `${method.toUpperCase()} ${path}`), ` ${found.description ?? ""}`)];
  const rows = (found.parameters ?? []).flatMap(({ name, schema, description, in: place }) => [
    element("dt", {}, `${name} (${place})`), element("dd", {}, `${kind(schema)}. ${description ?? ""}`)]);
  const body = Object.values(found.requestBody?.content ?? {})[0]?.schema;
  if (body) rows.push(...fields(body));
  if (rows.length) parts.push(element("dl", {}, ...rows));
  return element("details", {}, ...parts);
}

const groups = new Map();
for (const [path, methods] of Object.entries(spec.paths)) {
  for (const [method, found] of Object.entries(methods)) {
    const [tag] = found.tags ?? ["other"];
    groups.set(tag, [...(groups.get(tag) ?? []), operation(path, method, found)]);
  }
}
$("page").replaceChildren(...[...groups].flatMap(([tag, entries]) => [element("h2", {}, tag), ...entries]));
