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
  if (served.max_context) rows.push(["context", tokens(served.max_context)]);
  if (said.format) rows.push(["weights", said.format]);
  if (said.backend) rows.push(["on", said.backend]);
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
  #count = 0; // tokens; chunks, as long as the server has not counted tokens
  #counted = false;
  #atFirst = 0;
  #recent = []; // [ms, tokens so far], the last two seconds
  #prompt = 0;
  #cached = 0;
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

  take(event) {
    const now = performance.now();
    if (event.text || event.thought) {
      if (!this.#counted) this.#count += 1;
      if (this.#first === null) {
        this.#first = now;
        this.#atFirst = this.#count; // the first chunk may bring several
      }
    }
    if (event.usage) {
      this.#counted = true;
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
    if (this.#count > this.#atFirst && last > this.#first) {
      this.#show(((this.#count - this.#atFirst) * 1000) / (last - this.#first));
    }
    const said = [];
    if (this.#count) said.push(tokens(this.#count));
    if (this.#first !== null) said.push(`first after ${significant((this.#first - this.#began) / 1000)} s`);
    if (this.#cached) said.push(`${this.#cached.toLocaleString("en")} reused`);
    if (stopped) said.push("stopped");
    else if (this.#reason === "length") said.push("at its limit");
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
