// Draws each figure when it comes near the view, in the colours of the reader's theme; paper is always light.
(() => {
  const styles = JSON.parse(document.getElementById("styles").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];
  const DATA = new Set(["x", "y", "z", "text", "customdata", "hovertext"]);

  async function unpacked(base64) {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // A library as large as this is evaluated once the words of the page are there to be read.
  const library = new Promise((ready) => requestAnimationFrame(() => setTimeout(ready))).then(async () => {
    const script = document.createElement("script");
    script.textContent = await unpacked(document.getElementById("plotlyjs").textContent);
    document.head.append(script);
  });

  const recoloured = (value, key) => {
    if (typeof value === "string") return styles.dark[value] ?? value;
    if (value === null || typeof value !== "object" || DATA.has(key)) return value;
    if (Array.isArray(value)) return value.map((inner) => recoloured(inner));
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, recoloured(inner, name)]));
  };

  function styled(figure, mode) {
    const { data, layout } = mode === "dark" ? recoloured(figure) : structuredClone(figure);
    const page = getComputedStyle(document.body);
    layout.template = styles.templates[mode];
    layout.font = { ...layout.font, color: styles.ink[mode] };
    layout.paper_bgcolor = layout.plot_bgcolor = mode === "dark" ? page.getPropertyValue("--page").trim() : "#fff";
    return { data, layout };
  }

  function draw(place, mode) {
    if (!place.figure || place.mode === mode) return;
    const { data, layout } = styled(place.figure, mode);
    const config = {
      displaylogo: false, responsive: true, toImageButtonOptions: { format: "svg", filename: place.dataset.name },
    };
    Plotly.react(place, data, layout, config);
    place.mode = mode;
  }

  const read = async (place) => {
    place.figure ??= JSON.parse(await unpacked(place.dataset.figure));
    await library;
  };
  let printing = false;
  const theme = () => (dark.matches && !printing ? "dark" : "light");
  const near = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) read(target).then(() => draw(target, theme()));
    }
  }, { rootMargin: "600px" });
  plots.forEach((place) => near.observe(place));

  const everywhere = () => plots.forEach((place) => (place.mode || printing) && draw(place, theme()));
  dark.addEventListener("change", everywhere);
  // Printing cannot wait, so what is to be printed is unpacked beforehand, in moments of rest.
  (async () => {
    await library;
    for (const place of plots) {
      await new Promise((rest) => (window.requestIdleCallback ?? setTimeout)(rest));
      await read(place);
    }
    document.documentElement.dataset.printable = "yes";
  })();
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details.figures").forEach((fold) => (fold.open = true));
    printing = true;
    everywhere();
  });
  addEventListener("afterprint", () => {
    printing = false;
    everywhere();
  });

  // The contents mark the section that is being read.
  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const reading = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      const link = links.get(target.id);
      link.setAttribute("aria-current", "location");
      link.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  }, { rootMargin: "-10% 0px -80% 0px" });
  links.forEach((_, id) => reading.observe(document.getElementById(id)));
})();
