// How fast an answer comes, and how near that is to what the machine's memory allows.
// Knows numbers and the line that shows them; nothing of the conversation.
//
//   const pace = new Pace(served, element); pace.take({ text: "…" }); pace.end(false);

const WINDOW_S = 2; // the rate shown while the model speaks is that of so many last seconds
const EVERY_MS = 250;

function significant(value) {
  if (value >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(value >= 10 ? 1 : 2);
}

const tokens = (count) => `${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`;

/** Name and value of what there is to say about a model before anything was asked. */
export function facts(served) {
  const said = served.finial ?? {};
  const rows = [];
  if (said.format) rows.push(["weights", said.format]);
  if (said.backend) rows.push(["on", said.backend]);
  if (said.max_context) rows.push(["context", tokens(said.max_context)]);
  if (said.read_gb_s) rows.push(["memory", `${significant(said.read_gb_s)} GB/s`]);
  return rows;
}

/** Bytes that one step must read at this depth, times steps per second, over the measured bandwidth; null: unknown. */
export function share(served, rate, depth) {
  const said = served?.finial;
  if (!said?.read_gb_s || !said.step_bytes || !rate) return null;
  return ((said.step_bytes + (said.kv_bytes_per_token ?? 0) * depth) * rate) / (said.read_gb_s * 1e9);
}

export class Pace {
  #served;
  #line;
  #began = performance.now();
  #first = null;
  #count = 0;
  #recent = []; // [ms, tokens so far], the last two seconds
  #prompt = 0;
  #cached = 0;
  #exact = null; // tokens/s as the server's own clock has them
  #reason = null;
  #shown = 0;
  #rate;
  #roof;
  #rest;

  constructor(served, line) {
    this.#served = served;
    this.#line = line;
    this.#rate = document.createElement("b");
    this.#rest = document.createElement("span");
    this.#roof = document.createElement("span");
    this.#roof.className = "roof";
    this.#roof.hidden = true;
    const gauge = document.createElement("span");
    gauge.className = "gauge";
    gauge.setAttribute("aria-hidden", "true");
    gauge.append(document.createElement("i"));
    this.#roof.append(gauge, document.createElement("span"));
    this.#rest.textContent = "Reading …";
    line.append(this.#rate, this.#roof, this.#rest);
  }

  /** Whether the server had no bandwidth to tell when this began. */
  get wantsBandwidth() {
    return Boolean(this.#served?.finial && !this.#served.finial.read_gb_s);
  }

  take(event) {
    const now = performance.now();
    if (event.text || event.thought) {
      this.#first ??= now;
      this.#count += 1;
    }
    if (event.finial?.tokens) this.#count = event.finial.tokens;
    if (event.finial?.decode_tok_s) this.#exact = event.finial.decode_tok_s;
    if (event.usage) {
      this.#count = event.usage.completion_tokens;
      this.#prompt = event.usage.prompt_tokens;
      this.#cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
    }
    if (event.reason) this.#reason = event.reason;
    this.#recent.push([now, this.#count]);
    while (now - this.#recent[0][0] > WINDOW_S * 1000) this.#recent.shift();
    if (now - this.#shown > EVERY_MS && this.#count > 1) {
      this.#shown = now;
      const [then, before] = this.#recent[0];
      if (now > then) this.#show(((this.#count - before) * 1000) / (now - then));
    }
  }

  end(stopped) {
    const last = this.#recent.at(-1)?.[0];
    let rate = this.#exact;
    if (rate === null && this.#count > 1 && last > this.#first) rate = ((this.#count - 1) * 1000) / (last - this.#first);
    if (rate !== null) this.#show(rate);
    const said = [];
    if (this.#count) said.push(tokens(this.#count));
    if (this.#first !== null) said.push(`first after ${significant((this.#first - this.#began) / 1000)} s`);
    if (this.#cached) said.push(`${this.#cached.toLocaleString("en")} of ${tokens(this.#prompt)} reused`);
    if (stopped) said.push("stopped");
    else if (this.#reason === "length") said.push("cut at the limit of tokens");
    this.#rest.textContent = said.join(" · ");
    if (!said.length) this.#line.replaceChildren();
  }

  #show(rate) {
    this.#rate.textContent = `${significant(rate)} tok/s`;
    const part = share(this.#served, rate, this.#prompt + this.#count);
    this.#roof.hidden = part === null;
    if (part !== null) {
      this.#roof.firstChild.firstChild.style.transform = `scaleX(${Math.min(1, part)})`;
      this.#roof.lastChild.textContent = `${significant(100 * part)} % of roofline`;
    }
    this.#rest.textContent = tokens(this.#count);
  }
}
